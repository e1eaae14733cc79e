"""What a generation benchmark consists of: its prompts, the files its scorer opens, and its result files."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from uae_jax import files


class SuiteError(ValueError):
  """Raised for prompts or results that are not those of the suite; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt of a suite.

  Attributes:
    key: identifies the prompt in the official result file.
    index: position in the official list, from 0; the noise of its images depends on the seed, this and the sample.
    text: what the decoder is given.
    category: category of the official table.
    record: the prompt's own record, for files that repeat it.
  """

  key: str
  index: int
  text: str
  category: str = ""
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Target:
  """One image file of a prompt.

  Attributes:
    file: path in the output folder.
    samples: samples of the prompt that it shows; several are tiled row by row.
  """

  file: str
  samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of a result file.

  Attributes:
    items: key of a prompt -> its score, the mean over its samples.
    categories: category -> score of the official table.
    overall: the official overall score.
    notes: what a reader of the scores must know, such as missing rows.
    intervals: category, or "overall" -> ends of its 95 % interval; of suites that are scored here.
    metrics: name of a further metric -> its scores over the same prompts.
    item_categories: key of a prompt -> its category, where only scoring finds it.
  """

  items: Mapping[str, float]
  categories: Mapping[str, float]
  overall: float
  notes: tuple[str, ...] = ()
  intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  metrics: Mapping[str, "Scores"] = dataclasses.field(default_factory=dict)
  item_categories: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """A generation benchmark.

  Attributes:
    name: name on the command line.
    prompts_file: what `--prompts` has to name, in words.
    num_prompts: number of official prompts.
    num_samples: official number of samples per prompt.
    read_prompts: path -> prompts in official order; raises `SuiteError`.
    targets: (prompt, number of samples) -> its image files.
    texts: prompt -> {path in the output folder: content} of small text files beside the images.
    result_files: output folder -> existing result files of the official scorer at their usual places.
    read_results: (result files, prompts) -> scores; raises `SuiteError`.
    scale: factor between `Scores` and the numbers that papers print.
    published: system -> overall score as printed.
    is_square: whether the official scorer needs square images.
  """

  name: str
  prompts_file: str
  num_prompts: int
  num_samples: int
  read_prompts: Callable[[Path], list[Prompt]]
  targets: Callable[[Prompt, int], list[Target]]
  texts: Callable[[Prompt], Mapping[str, str]] = lambda prompt: {}
  result_files: Callable[[Path], list[Path]]
  read_results: Callable[[Sequence[Path], Sequence[Prompt]], Scores]
  scale: float = 1.0
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)
  is_square: bool = False


def json_lines(file: Path) -> Iterator[tuple[str, dict]]:
  """Yields ("FILE, line N", record) for the lines of a JSON lines file; empty lines are skipped.

  Raises:
    SuiteError: a line is not a JSON object.
  """
  for number, line in enumerate(files.read_lines(file), 1):
    if not line.strip():
      continue
    place = f"{file}, line {number}"
    record = _parse(line, place)
    if not isinstance(record, dict):
      raise SuiteError(f"{place}: expected a JSON object, found {type(record).__name__}")
    yield place, record


def read_json(file: Path) -> Any:
  """Reads a JSON file.

  Raises:
    SuiteError: it is not JSON.
  """
  return _parse("\n".join(files.read_lines(file)), str(file))


def _parse(text: str, place: str) -> Any:
  try:
    return json.loads(text)  # with NaN, which scorers in Python write
  except (ValueError, RecursionError) as error:
    raise SuiteError(f"{place}: not JSON ({error})") from error


def field(place: str, record: Mapping, name: str, kind: type | tuple[type, ...]) -> Any:
  """Returns a field of a record.

  Raises:
    SuiteError: it is absent or of another type.
  """
  value = record.get(name)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    found = "no such field" if name not in record else f"found {value!r}"
    raise SuiteError(f"{place}: field {name!r}: {found}; is it the file of another benchmark?")
  return value


def unique(prompts: Sequence[Prompt], file: Path) -> list[Prompt]:
  """Returns the prompts.

  Raises:
    SuiteError: there is none, or two have the same key.
  """
  if not prompts:
    raise SuiteError(f"{file}: no prompt in it")
  seen: set[str] = set()
  for prompt in prompts:
    if prompt.key in seen:
      raise SuiteError(f"{file}: prompt {prompt.key!r} is there twice")
    seen.add(prompt.key)
  return list(prompts)


def category_scores(values: Mapping[str, Sequence[float]], prompts: Sequence[Prompt]) -> Scores:
  """Averages scores of images per prompt and per category; the overall score is the mean of the categories.

  Args:
    values: key of a prompt -> scores of its images.
    prompts: prompts of the run.

  Raises:
    SuiteError: no prompt has a score, or a score belongs to no prompt.
  """
  known = {prompt.key for prompt in prompts}
  strangers = [key for key in values if key not in known]
  if strangers:
    raise SuiteError(f"results name {strangers[0]!r}, which is no prompt of this run: are they of another run?")
  items = {key: sum(scores) / len(scores) for key, scores in values.items() if scores}
  if not items:
    raise SuiteError("the result file has no score")
  by_category: dict[str, list[float]] = defaultdict(list)
  for prompt in prompts:
    by_category[prompt.category] += values.get(prompt.key, ())
  categories = {name: sum(scores) / len(scores) for name, scores in by_category.items() if scores}
  most = max(map(len, values.values()))
  missing = [prompt.key for prompt in prompts if prompt.key not in items]
  short = [key for key in items if len(values[key]) < most]
  notes = (
    *missing_note(missing, len(prompts)),
    *([f"{len(short)} prompts have fewer than {most} scored images, the first is {short[0]!r}"] if short else []),
  )
  return Scores(items, categories, sum(categories.values()) / len(categories), notes)


def missing_note(missing: Sequence[str], count: int) -> list[str]:
  """The note about prompts without a score; empty if all have one."""
  return [f"{len(missing)} of {count} prompts have no score, the first is {missing[0]!r}"] if missing else []


def one_sample(suite: str, file: Callable[[Prompt], str]) -> Callable[[Prompt, int], list[Target]]:
  """Makes the `targets` of a suite that scores one image per prompt.

  Args:
    suite: name of the suite.
    file: prompt -> its image file.
  """

  def targets(prompt: Prompt, num_samples: int) -> list[Target]:
    if num_samples != 1:
      raise SuiteError(f"--samples {num_samples}: {suite} scores one image per prompt")
    return [Target(file(prompt), (0,))]

  return targets


def number(place: str, value: Any) -> float:
  """Returns a finite number.

  Raises:
    SuiteError: the value is not one.
  """
  try:
    result = float(value)
  except (TypeError, ValueError):
    result = math.nan
  if not math.isfinite(result):
    raise SuiteError(f"{place}: expected a score, found {value!r}")
  return result

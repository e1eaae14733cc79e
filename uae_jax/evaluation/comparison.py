"""Results side by side: our `results.json` and official result files, and the paired differences of two of them."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from uae_jax import files
from uae_jax.evaluation import intervals, results, suites
from uae_jax.evaluation.suites.spec import Suite
from uae_jax.evaluation.suites.task import Task

# Settings without which two results have no items in common.
SHARED = ("suite", "prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """One scored result.

  Attributes:
    path: as it was given.
    folder: where its images are.
    settings: settings of the run; an official file has `suite` and `prompts` at most.
    items: key of a prompt -> its score.
    overall: the official overall score.
    scale: factor between the scores and the numbers that papers print.
    notes: what a reader of the scores must know.
    categories: key -> category of the official table.
    texts: key -> prompt.
    images: key -> image files in `folder`.
    metric: name of the scores, "" if the suite has no name for them.
    metrics: further scores of the same prompts, by name: (key -> score, overall score).
  """

  path: Path
  folder: Path
  settings: Mapping[str, Any]
  items: Mapping[str, float]
  overall: float
  scale: float = 1.0
  notes: Sequence[str] = ()
  categories: Mapping[str, str] = dataclasses.field(default_factory=dict)
  texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  images: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  metric: str = ""
  metrics: Mapping[str, tuple[Mapping[str, float], float]] = dataclasses.field(default_factory=dict)

  def by_metric(self) -> dict[str, "Result"]:
    """A result per metric that has a score per prompt, the first one included."""
    further = {
      name: dataclasses.replace(self, items=items, overall=overall, metric=name, metrics={})
      for name, (items, overall) in self.metrics.items()
      if items
    }
    return {self.metric: self, **further}

  @property
  def has_settings(self) -> bool:
    """Whether it is known how the result was made."""
    return bool(self.settings.keys() - set(SHARED))


def read(path: Path, suite: Suite | None = None, prompts_file: Path | None = None) -> Result:
  """Reads a scored result.

  Args:
    path: a `results.json` or its folder; or an official result file of Unified-Bench, or of `suite`.
    suite: suite of official result files.
    prompts_file: prompts of `suite`.

  Raises:
    ValueError: it is none of these, or has no scores.
  """
  if (result := _ours(path)) is not None:
    return result
  if not path.exists():
    raise ValueError(f"{path}: no such file")
  if (result := _unified_bench(path)) is not None:
    return result
  if suite is None or prompts_file is None:
    raise ValueError(f"{path}: no {results.FILE}; an official result file needs --suite and --prompts")
  return _official(path, suite, prompts_file)


def _ours(path: Path) -> Result | None:
  try:
    found = results.read(path)
  except ValueError:
    if path.name == results.FILE or path.is_dir():
      raise
    return None  # An official file may be JSON as well.
  if found is None:
    return None
  if "scores" not in found:
    raise ValueError(f"{path} has no scores yet: run the official scorer, then uae-jax evaluate without --model")
  scores = found["scores"]
  return Result(
    path=path,
    folder=path if path.is_dir() else path.parent,
    settings=found["settings"],
    items=scores["items"],
    overall=scores["overall"],
    scale=scores["scale"],
    notes=scores["notes"],
    categories=found.get("prompt_categories", {}),
    texts=found.get("prompt_texts", {}),
    images=found.get("prompt_files", {}),
    metric=_name_of_scores(found["settings"]["suite"]),
    metrics={name: (metric["items"], metric["overall"]) for name, metric in scores.get("metrics", {}).items()},
  )


def _name_of_scores(name: str) -> str:
  suite = suites.find(name) if name in suites.SUITES else None
  return suite.metric if isinstance(suite, Task) else ""


def _unified_bench(path: Path) -> Result | None:
  """Reads the official file of Unified-Bench; the score of a reconstruction is its mean over the embedders."""
  if path.suffix != ".json":
    return None
  try:
    content = json.loads(files.read_text(path))
    by_model = content["similarities_by_model"].values()
    names = set.intersection(*(set(values) for values in by_model))
    items = {
      name: float(np.mean(scores))
      for name in sorted(names)
      if None not in (scores := [values[name] for values in by_model])
    }
  except (ValueError, KeyError, TypeError, AttributeError):
    return None
  if not items:
    raise ValueError(f"{path}: no reconstruction in it has a similarity under every embedder")
  return Result(
    path=path,
    folder=path.parent,
    settings={"suite": "unified_bench"},
    items=items,
    overall=_mean(items),
    scale=100.0,
    texts={name: name for name in items},
    images={name: [name] for name in items},
    metric="mean similarity",
    metrics={
      kind: (known := {name: value for name, value in values.items() if value is not None}, _mean(known))
      for kind, values in content["similarities_by_model"].items()
    },
  )


def _mean(items: Mapping[str, float]) -> float:
  return float(np.mean(list(items.values())))


def _official(path: Path, suite: Suite, prompts_file: Path) -> Result:
  prompts = suite.read_prompts(prompts_file)
  paths = suite.result_files(path) if path.is_dir() else [path]
  if not paths:
    raise ValueError(f"{path}: no result file of {suite.name} in it")
  scores = suite.read_results(paths, prompts)
  return Result(
    path=path,
    folder=path if path.is_dir() else path.parent,
    settings={"suite": suite.name, "prompts": results.prompts_hash(prompts)},
    items=scores.items,
    overall=scores.overall,
    scale=suite.scale,
    notes=scores.notes,
    categories={prompt.key: prompt.category for prompt in prompts},
    texts={prompt.key: prompt.text for prompt in prompts},
    images={prompt.key: [target.file for target in suite.targets(prompt, suite.num_samples)] for prompt in prompts},
  )


def differences(one: Result, other: Result) -> list[str]:
  """Lists what besides the weights may explain a difference of two results; weights are what is compared.

  Raises:
    ValueError: they are of different suites or prompts.
  """
  for name in SHARED:
    if one.settings.get(name) != other.settings.get(name):
      raise ValueError(f"{one.path} and {other.path} have different {name}: they have no prompts to compare")
  unknown = [f"the settings of {result.path} are not known" for result in (one, other) if not result.has_settings]
  if unknown:
    return unknown
  return [text for text in results.differences(one.settings, other.settings) if not text.startswith("weights:")]


def shared_keys(one: Result, other: Result) -> list[str]:
  """Lists the prompts that both results have a score for.

  Raises:
    ValueError: there is none.
  """
  keys = [key for key in one.items if key in other.items]
  if not keys:
    raise ValueError(f"{one.path} and {other.path} have no scored prompt in common")
  return keys


def shared_metrics(one: Result, other: Result) -> dict[str, tuple[Result, Result]]:
  """The metrics with prompts that both results have a score for: name -> (one, other) of this metric.

  Raises:
    ValueError: there is none.
  """
  ours, theirs = one.by_metric(), other.by_metric()
  names = [name for name in ours if name in theirs and ours[name].items.keys() & theirs[name].items.keys()]
  if not names:
    raise ValueError(f"{one.path} and {other.path} have no scored prompt in common")
  return {name: (ours[name], theirs[name]) for name in names}


def paired(one: Result, other: Result, *, resamples: int = 10_000) -> list[dict[str, Any]]:
  """Compares two results over the prompts that both have.

  Args:
    one: result A.
    other: result B.
    resamples: bootstrap resamples of the 95 % interval; drawn with a fixed seed.

  Returns:
    One row per category, then one of all prompts: category, count, means `a` and `b`, `difference` b - a, its interval
    `low` to `high`, `wins` and `losses` of b.

  Raises:
    ValueError: no prompt has a score in both.
  """
  keys = shared_keys(one, other)
  category = {key: one.categories.get(key, "") for key in keys}
  rows = [
    _row(name, [key for key in keys if category[key] == name], one.items, other.items, resamples)
    for name in dict.fromkeys(category.values())
    if name
  ]
  return [*rows, _row("all", keys, one.items, other.items, resamples)]


def _row(name: str, keys: Sequence[str], a: Mapping, b: Mapping, resamples: int) -> dict[str, Any]:
  before, after = (np.array([items[key] for key in keys], np.float64) for items in (a, b))
  gains = after - before
  low, high = intervals.bootstrap(gains.tolist(), resamples)
  return {
    "category": name,
    "count": len(keys),
    "a": float(np.mean(before)),
    "b": float(np.mean(after)),
    "difference": float(np.mean(gains)),
    "low": low,
    "high": high,
    "wins": int(np.sum(gains > 0)),
    "losses": int(np.sum(gains < 0)),
  }


def extremes(one: Result, other: Result, count: int) -> tuple[list[str], list[str]]:
  """Returns the prompts with the largest gains of `other`, and those with its largest losses, at most `count` each."""
  gains = {key: other.items[key] - one.items[key] for key in shared_keys(one, other)}
  ordered = sorted(gains, key=lambda key: -gains[key])
  return (
    [key for key in ordered[:count] if gains[key] > 0],
    [key for key in ordered[::-1][:count] if gains[key] < 0],
  )

"""A suite that is scored here: the model works on each item, what it made is kept as a row, and rows become scores."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from uae_jax.evaluation import intervals
from uae_jax.evaluation.suites.spec import Prompt, Scores, SuiteError, missing_note

Rows = Mapping[str, Mapping[str, Any]]  # key of an item -> its row


@dataclasses.dataclass(frozen=True)
class Run:
  """What a task works with.

  Attributes:
    out: output folder.
    uae: the model, an `api.UAE`; None where finished rows are scored again.
    bench: (arguments of `uae-jax bench`, pictures) -> exit code, `commands.bench.main`; None while a stage trains.
    seed: seed of the run.
    samples: samples per item.
    captions: options of `UAE.caption` and `UAE.answer`.
    images: options of `UAE.generate`.
    embedders: kind -> `embedders.host.Embedder`.
    embedder_paths: kind -> path it was loaded from.
    judge: options of `uae-jax bench` for its protocol 2; empty without a judge.
  """

  out: Path
  uae: Any
  bench: Callable[[list[str], list[Path]], int] | None
  seed: int = 0
  samples: int = 1
  captions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  images: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  embedders: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  embedder_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
  judge: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A suite that is scored here.

  Attributes:
    name: name on the command line.
    prompts_file: what `--prompts` has to name, in words.
    read_prompts: path -> items in order; raises `SuiteError`.
    work: (run, items of a batch) -> one row per item, which JSON can hold. A failure of the batch is traced to its
      item by a call per item.
    score: (run, all items, rows of those that are done) -> scores, or None if there is nothing to compute; may write
      files of other scorers into the output folder.
    makes: what it makes of the model's abilities, "captions" and "images": these settings are recorded.
    embedders: what it does with `--embedders`: "" leaves them to others, "used" loads those that are given, "needed"
      cannot do without, "text" needs those with a text tower too.
    runs_bench: whether it scores with `Run.bench`.
    metric: name of its score, shown where there are further ones.
    num_samples: default of `--samples`.
    temperature: default of `--temperature`.
    max_new_tokens: default of `--max-new-tokens`; None takes the model's own.
    scale: factor between `Scores` and the numbers that papers print.
    published: system -> overall score as printed.
  """

  name: str
  prompts_file: str
  read_prompts: Callable[[Path], list[Prompt]]
  work: Callable[[Run, Sequence[Prompt]], Sequence[Mapping[str, Any]]]
  score: Callable[[Run, Sequence[Prompt], Rows], Scores | None]
  makes: tuple[str, ...]
  embedders: str = ""
  runs_bench: bool = False
  metric: str = ""
  num_samples: int = 1
  temperature: float = 0.7
  max_new_tokens: int | None = None
  scale: float = 1.0
  published: Mapping[str, float] = dataclasses.field(default_factory=dict)


def summarize(
  values: Mapping[str, float], prompts: Sequence[Prompt], *, category: Callable[[Prompt], str] | None = None
) -> Scores:
  """Averages a metric per category and over all items, with 95 % intervals.

  Values that are all 0 or 1 have Wilson's interval, others that of the bootstrap.

  Args:
    values: key of an item -> its value; items without one are counted in a note.
    prompts: all items.
    category: item -> its category; default: its attribute of that name. "" is no category.

  Raises:
    SuiteError: there is no value.
  """
  if not values:
    raise SuiteError("no item has a score")
  names = {prompt.key: category(prompt) if category else prompt.category for prompt in prompts if prompt.key in values}
  groups: dict[str, list[float]] = defaultdict(list)
  for key, name in names.items():
    if name:
      groups[name].append(values[key])
  groups["overall"] = list(values.values())
  is_share = all(value in (0, 1) for value in values.values())
  found = {name: (intervals.wilson if is_share else intervals.bootstrap)(group) for name, group in groups.items()}
  means = {name: sum(group) / len(group) for name, group in groups.items()}
  overall = means.pop("overall")
  missing = [prompt.key for prompt in prompts if prompt.key not in values]
  notes = tuple(missing_note(missing, len(prompts)))
  return Scores(dict(values), means, overall, notes, found, item_categories=names if category else {})

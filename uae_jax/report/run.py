"""Reads the workdir of a run, finished or still going: stages in run order, metric lines, held-out figures, samples."""

from collections.abc import Mapping
import dataclasses
import json
import math
from pathlib import Path
import re
from typing import Any

from uae_jax.options import REINFORCEMENT, STAGES
from uae_jax.weights import legacy

GENERATION, UNDERSTANDING = REINFORCEMENT


def _words(name: str) -> dict[str, str]:
  """Title of a stage and name of the moment after it; those of an unknown stage are made from its name."""
  unknown = {"title": name.replace("_", " ").capitalize(), "moment": f"After {name}"}
  return STAGES.get(legacy.stage(name), unknown)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One pass of a stage; `round` is None where a run has one round."""

  name: str
  round: int | None = None

  @property
  def key(self) -> str:
    """As in file names: `generation_for_understanding_round1`."""
    return self.name if self.round is None else f"{self.name}_round{self.round}"

  @property
  def title(self) -> str:
    return self._with_round(_words(self.name)["title"])

  @property
  def moment(self) -> str:
    """What a column of samples taken after this stage is called."""
    return self._with_round(_words(self.name)["moment"])

  @property
  def order(self) -> tuple:
    names, name = list(STAGES), legacy.stage(self.name)
    position = names.index(name) if name in names else len(names)
    # Rounds alternate the two RL stages; everything else comes before them, unknown stages after.
    if self.name in REINFORCEMENT:
      return (names.index(GENERATION), self.round or 0, position, self.name)
    return (position, self.round or 0, position, self.name)

  def _with_round(self, text: str) -> str:
    return text if self.round is None else f"{text}, round {self.round}"

  @classmethod
  def from_key(cls, key: str) -> "Stage":
    match = re.fullmatch(r"(.+)_round(\d+)", key)
    return cls(match[1], int(match[2])) if match else cls(key)


@dataclasses.dataclass
class Run:
  """Everything the report shows.

  Attributes:
    stages: in run order, every stage of which something was found.
    metrics: the lines of metrics.jsonl of each stage, by step.
    evaluations: the held-out figures after each stage.
    galleries: the items of samples/<stage>/gallery.json.
    captions: samples/<stage>/captions.json, one image's captions over training.
    notes: what could not be read.
  """

  workdir: Path
  config: dict
  stages: list[Stage]
  metrics: dict[Stage, list[dict]]
  evaluations: dict[Stage, dict[str, float]]
  galleries: dict[Stage, list[dict]]
  captions: dict[Stage, dict]
  notes: list[str]

  def samples_folder(self, stage: Stage) -> Path:
    return self.workdir / "samples" / stage.key

  def evaluated_before(self, stage: Stage, figure: str) -> Stage | None:
    """The last stage before `stage` whose evaluation has `figure`."""
    before = self.stages[: self.stages.index(stage)]
    return next((s for s in reversed(before) if figure in self.evaluations.get(s, {})), None)


def number(value: Any) -> float:
  """A metric as float; what is no number (null stands for a value that was not finite) as nan."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return float(value) if is_number else math.nan


def _read_json(file: Path, kind: type, notes: list[str]):
  """The content of a file if it is readable and of this kind; else None and a note."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    notes.append(f"{file.name} could not be read ({error})")
    return None
  if not isinstance(content, kind):
    notes.append(f"{file.name} could not be read (expected a JSON {'object' if kind is dict else 'list'})")
    return None
  return content


def _read_metrics(file: Path, notes: list[str]) -> list[dict]:
  lines = file.read_bytes().splitlines()
  records, bad = [], 0
  for position, line in enumerate(lines):
    try:
      record = json.loads(line)
      records.append(record | {"stage": str(record["stage"]), "step": int(record["step"])})
    except (ValueError, KeyError, TypeError):
      # The last line of a run that is still going may be half written.
      bad += bool(line.strip()) and position < len(lines) - 1
  if bad:
    notes.append(f"{bad} unreadable lines of {file.name} were skipped")
  return records


def _one_line_a_step(records: list[dict]) -> list[dict]:
  """By step; several lines of a step (losses, then held-out captions) as one, of a repeated metric the later value."""
  merged: dict[int, dict] = {}
  for record in records:
    merged.setdefault(record["step"], {}).update(record)
  return [record for _, record in sorted(merged.items())]


def read_run(workdir: str | Path) -> Run:
  """Reads what a run has written so far.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: the folder is not the workdir of a run.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"{workdir}: no such workdir")
  config_file, metrics_file = workdir / "config.json", workdir / "metrics.jsonl"
  evaluation_files = sorted((workdir / "evaluation").glob("*.json"))
  if not (config_file.is_file() or metrics_file.is_file() or evaluation_files):
    raise ValueError(f"{workdir}: not the workdir of a run (no config.json, metrics.jsonl or evaluation/)")

  notes: list[str] = []
  config = (_read_json(config_file, dict, notes) if config_file.is_file() else None) or {}
  records = _read_metrics(metrics_file, notes) if metrics_file.is_file() else []

  evaluations = {}
  for file in evaluation_files:
    figures = _read_json(file, dict, notes)
    if figures is not None:
      evaluations[Stage.from_key(file.stem)] = {
        name: number(value) for name, value in flatten(figures).items() if math.isfinite(number(value))
      }

  by_stage: dict[Stage, list[dict]] = {}
  for record in records:
    # Rounds count from 1; 0 is a run without rounds.
    round_number = number(record.get("round"))
    stage = Stage(record["stage"], int(round_number) if round_number > 0 else None)
    by_stage.setdefault(stage, []).append(record)
  metrics = {stage: _one_line_a_step(lines) for stage, lines in by_stage.items()}

  galleries, captions = {}, {}
  for folder in sorted((workdir / "samples").glob("*")):
    stage = Stage.from_key(folder.name)
    if (folder / "gallery.json").is_file():
      content = _read_json(folder / "gallery.json", dict, notes) or {}
      items = [item for item in content.get("items", []) if isinstance(item, dict)]
      if items:
        galleries[stage] = items
    if (folder / "captions.json").is_file():
      content = _read_json(folder / "captions.json", dict, notes) or {}
      if content.get("steps"):
        captions[stage] = content

  stages = sorted({*metrics, *evaluations, *galleries, *captions}, key=lambda stage: stage.order)
  return Run(workdir, config, stages, metrics, evaluations, galleries, captions, notes)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat

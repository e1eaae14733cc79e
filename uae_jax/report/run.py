"""Reads the workdir of a finished or unfinished run: stages in run order, metrics, evaluations, samples."""

from collections.abc import Mapping
import dataclasses
import json
import math
from pathlib import Path
import re
from typing import Any

from uae_jax import metrics_file
from uae_jax.options import REINFORCEMENT, STAGES
from uae_jax.weights import legacy

GENERATION = REINFORCEMENT[0]
REWARD = "reward_similarity"
OF_IMAGES = ("psnr", "object_accuracy")


def _words(name: str) -> dict[str, str]:
  """The title of a stage and the label of samples taken after it; derived from the name if the stage is unknown."""
  unknown = {"title": name.replace("_", " ").capitalize(), "moment": f"After {name}"}
  return STAGES.get(legacy.stage(name), unknown)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One pass of a stage; `round` is None in a run with one round."""

  name: str
  round: int | None = None

  @property
  def key(self) -> str:
    """Name in file names, such as `generation_for_understanding_round1`."""
    return self.name if self.round is None else f"{self.name}_round{self.round}"

  @property
  def title(self) -> str:
    return self._with_round(_words(self.name)["title"])

  @property
  def moment(self) -> str:
    """Label of samples taken after this stage."""
    return self._with_round(_words(self.name)["moment"])

  @property
  def order(self) -> tuple:
    names, name = list(STAGES), legacy.stage(self.name)
    position = names.index(name) if name in names else len(names)
    # Rounds alternate the RL stages. All other known stages come before them, unknown stages after.
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
  """Everything that the report shows.

  Attributes:
    stages: every stage with any output, in run order.
    metrics: the lines of metrics.jsonl of each stage, sorted by step, one per step.
    evaluations: the held-out metrics after each stage.
    galleries: the items of samples/<stage>/gallery.json.
    captions: samples/<stage>/captions.json, the captions of one image over training.
    changes: the lines of config_changes.jsonl: what changed when the run was resumed, and after which step.
    notes: messages about files and lines that could not be read.
  """

  workdir: Path
  config: dict
  stages: list[Stage]
  metrics: dict[Stage, list[dict]]
  evaluations: dict[Stage, dict[str, float]]
  galleries: dict[Stage, list[dict]]
  captions: dict[Stage, dict]
  changes: list[dict]
  notes: list[str]

  def samples_folder(self, stage: Stage) -> Path:
    return self.workdir / "samples" / stage.key

  def evaluated_before(self, stage: Stage, figure: str) -> Stage | None:
    """The last stage before `stage` whose evaluation has `figure`, measured on the same kind of image.

    Images generated from captions have a reward. The VAE's reconstructions have none, and are what such images can
    reach at best: they are no baseline of theirs.
    """
    has_reward = REWARD in self.evaluations.get(stage, {})

    def is_comparable(evaluation: dict) -> bool:
      return figure in evaluation and (figure not in OF_IMAGES or (REWARD in evaluation) == has_reward)

    before = self.stages[: self.stages.index(stage)]
    return next((s for s in reversed(before) if is_comparable(self.evaluations.get(s, {}))), None)


def number(value: Any) -> float:
  """Converts a metric to float; NaN if it is not a number (null stands for a non-finite value)."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return float(value) if is_number else math.nan


def _read_json(file: Path, kind: type, notes: list[str]):
  """The content of a JSON file if it is readable and of type `kind`; else None, with a note added to `notes`."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    notes.append(f"{file.name} could not be read ({error})")
    return None
  if not isinstance(content, kind):
    notes.append(f"{file.name} could not be read (expected a JSON {'object' if kind is dict else 'list'})")
    return None
  return content


def _read_changes(workdir: Path, notes: list[str]) -> list[dict]:
  """The readable lines of config_changes.jsonl; others are noted."""
  file, changes = workdir / "config_changes.jsonl", []
  for line in file.read_bytes().splitlines() if file.is_file() else []:
    try:
      record = json.loads(line)
      rows = {str(field): (before, after) for field, (before, after) in record["changes"].items()}
      changes.append({"stage": str(record["stage"]), "step": int(record["step"]), "changes": rows})
    except (ValueError, KeyError, TypeError, AttributeError):
      notes.append(f"a line of {file.name} could not be read")
  return changes


def _one_line_a_step(records: list[dict]) -> list[dict]:
  """Merges the lines of each step (losses, held-out captions) into one; later values override earlier ones."""
  merged: dict[int, dict] = {}
  for record in records:
    merged.setdefault(record["step"], {}).update(record)
  return [record for _, record in sorted(merged.items())]


def read_run(workdir: str | Path) -> Run:
  """Reads everything that a run has written so far.

  Raises:
    FileNotFoundError: the folder does not exist.
    ValueError: the folder is not the workdir of a run.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"{workdir}: no such workdir")
  config_file, metrics = workdir / "config.json", workdir / metrics_file.METRICS_FILE
  evaluation_files = sorted((workdir / "evaluation").glob("*.json"))
  if not (config_file.is_file() or metrics.is_file() or evaluation_files):
    raise ValueError(f"{workdir}: not the workdir of a run (no config.json, metrics.jsonl or evaluation/)")

  notes: list[str] = []
  config = (_read_json(config_file, dict, notes) if config_file.is_file() else None) or {}
  records: list[dict] = []
  if metrics.is_file():
    records, skipped = metrics_file.read(metrics)
    notes += skipped

  evaluations = {}
  for file in evaluation_files:
    figures = _read_json(file, dict, notes)
    if figures is not None:
      evaluations[Stage.from_key(file.stem)] = {
        name: number(value) for name, value in flatten(figures).items() if math.isfinite(number(value))
      }

  by_stage: dict[Stage, list[dict]] = {}
  for record in records:
    # Rounds count from 1; 0 means that the run has no rounds.
    stage = Stage(record["stage"], record["round"] if record["round"] > 0 else None)
    by_stage.setdefault(stage, []).append(record)
  by_step = {stage: _one_line_a_step(lines) for stage, lines in by_stage.items()}

  galleries, captions = {}, {}
  for folder in sorted((workdir / "samples").glob("*")):
    stage = Stage.from_key(folder.name)
    if (folder / "gallery.json").is_file():
      content = _read_json(folder / "gallery.json", dict, notes) or {}
      listed = content.get("items", [])
      items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
      if items:
        galleries[stage] = items
    if (folder / "captions.json").is_file():
      content = _read_json(folder / "captions.json", dict, notes) or {}
      if isinstance(content.get("steps"), list) and content["steps"]:
        captions[stage] = content

  stages = sorted({*by_step, *evaluations, *galleries, *captions}, key=lambda stage: stage.order)
  return Run(workdir, config, stages, by_step, evaluations, galleries, captions, _read_changes(workdir, notes), notes)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
  """Flattens nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat

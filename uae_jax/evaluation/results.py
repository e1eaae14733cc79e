"""`results.json` of `uae-jax evaluate`: the settings of a run, its files, and the scores once they are known."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
from importlib import metadata
import json
from pathlib import Path
from typing import Any

from uae_jax import files, json_files
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.options.sampling import EVERYWHERE
from uae_jax.plain import from_plain

FILE = "results.json"
VERSION = 1
# Fields that a result may lack.
DEFAULTS: dict[str, Any] = {"files": 0, "failed": {}}
SCORE_DEFAULTS: dict[str, Any] = {"categories": {}, "notes": []}
# Settings that say how a result was made but do not change it.
INCIDENTAL = ("model", "versions", "embedders")
# The settings of every result, and the types of those that commands read. COUNTS are at least 1.
REQUIRED = ("suite", "prompts", "weights")
COUNTS = ("num_prompts", "samples", "height", "width", "steps", "max_new_tokens")
TYPES = {
  **dict.fromkeys((*REQUIRED, "dtype", "embedders"), str),
  **dict.fromkeys((*COUNTS, "seed", "top_k"), int),
  **dict.fromkeys(("guidance", "shift", "temperature", "top_p", "min_p"), float),
  "guidance_interval": tuple[float, float],
  "int8": bool,
}
# Settings that came later, with what they are in a result that lacks them.
ABSENT = {"guidance_interval": list(EVERYWHERE)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Metric:
  """The plain form of `suites.spec.Scores` under one metric."""

  overall: float
  items: dict[str, float]
  categories: dict[str, float] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  intervals: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scores(_Metric):
  """The plain form of all scores."""

  scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
  """What `results.json` holds."""

  version: int
  settings: dict[str, Any]
  files: int = 0
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  official_results: tuple[str, ...] = ()
  prompt_categories: dict[str, str] = dataclasses.field(default_factory=dict)
  prompt_texts: dict[str, str] = dataclasses.field(default_factory=dict)
  prompt_files: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  scores: _Scores | None = None


def prompts_hash(prompts: Sequence[Prompt]) -> str:
  """Returns 16 hexadecimal digits of the keys and texts of the prompts."""
  text = json.dumps([(prompt.key, prompt.text) for prompt in prompts], ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
  return {name: metadata.version(name) for name in ("uae_jax", "jax", "flax", "transformers")}


def read(folder: Path) -> dict[str, Any] | None:
  """Reads the result of an output folder; None if it has none.

  Raises:
    ValueError: the file is not such a result, or one of another version; the message names the field.
  """
  file = folder if folder.suffix == ".json" else folder / FILE
  if not file.is_file():
    return None
  result = json_files.read_object(file)
  try:
    _check(result)
  except ValueError as error:
    raise ValueError(f"{file}: not a result of uae-jax evaluate: {error}") from error
  scores = result.pop("scores", None)
  return DEFAULTS | result | ({"scores": SCORE_DEFAULTS | scores} if scores else {})


def _check(result: Mapping[str, Any]) -> None:
  version = from_plain(int, result.get("version"), "version")
  if version != VERSION:
    raise ValueError(f"version = {version}: this release of uae_jax reads version {VERSION}")
  found = from_plain(_Result, result)
  settings, metrics = found.settings, found.scores.metrics if found.scores else {}
  for name, metric in metrics.items():
    from_plain(_Metric, metric, f"scores.metrics.{name}")
  for name in REQUIRED:
    if name not in settings:
      raise ValueError(f"settings lacks field {name!r}")
  for name, kind in TYPES.items():
    if name in settings:
      from_plain(kind, settings[name], f"settings.{name}")
  for name in COUNTS:
    if settings.get(name, 1) < 1:
      raise ValueError(f"settings.{name} = {settings[name]}: expected 1 or more")


def write(folder: Path, settings: Mapping, about: Mapping, scores: Scores | None, scale: float) -> dict[str, Any]:
  """Writes `results.json` and returns its content."""
  result: dict[str, Any] = {"version": VERSION, "settings": dict(settings), **about}
  if scores is not None:
    result["scores"] = _plain(scores) | {"scale": scale}
  folder.mkdir(parents=True, exist_ok=True)
  files.write_whole(folder / FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
  return result


def _plain(scores: Scores) -> dict[str, Any]:
  """Scores as JSON; intervals and further metrics only where there are some."""
  plain = {
    "overall": scores.overall,
    "categories": dict(scores.categories),
    "items": dict(scores.items),
    "notes": list(scores.notes),
  }
  if scores.intervals:
    plain["intervals"] = {name: list(interval) for name, interval in scores.intervals.items()}
  if scores.metrics:
    plain["metrics"] = {name: _plain(metric) for name, metric in scores.metrics.items()}
  return plain


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """Lists the settings that make two results incomparable, as "name: value, value"."""
  if "guidance" in one and "guidance" in other:
    one, other = ABSENT | dict(one), ABSENT | dict(other)
  names = sorted({*one, *other} - set(INCIDENTAL))
  return [f"{name}: {one.get(name)!r}, {other.get(name)!r}" for name in names if one.get(name) != other.get(name)]

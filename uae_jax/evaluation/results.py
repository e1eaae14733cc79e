"""`results.json` of `uae-jax evaluate`: the settings of a run, its files, and the scores once they are known."""

from collections.abc import Mapping, Sequence
import hashlib
from importlib import metadata
import json
from pathlib import Path
from typing import Any

from uae_jax import files
from uae_jax.evaluation.suites.spec import Prompt, Scores

FILE = "results.json"
VERSION = 1
# Settings that say how a result was made but do not change it.
INCIDENTAL = ("model", "versions", "embedders")


def prompts_hash(prompts: Sequence[Prompt]) -> str:
  """Returns 16 hexadecimal digits of the keys and texts of the prompts."""
  text = json.dumps([(prompt.key, prompt.text) for prompt in prompts], ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
  return {name: metadata.version(name) for name in ("uae_jax", "jax", "flax", "transformers")}


def read(folder: Path) -> dict[str, Any] | None:
  """Reads the result of an output folder; None if it has none.

  Raises:
    ValueError: the file is not such a result.
  """
  file = folder if folder.suffix == ".json" else folder / FILE
  if not file.is_file():
    return None
  try:
    result = json.loads("\n".join(files.read_lines(file)))
  except ValueError as error:
    raise ValueError(f"{file}: not JSON ({error})") from error
  if not isinstance(result, dict) or not isinstance(result.get("settings"), dict) or "suite" not in result["settings"]:
    raise ValueError(f"{file}: not a result of uae-jax evaluate")
  return result


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
  names = sorted({*one, *other} - set(INCIDENTAL))
  return [f"{name}: {one.get(name)!r}, {other.get(name)!r}" for name in names if one.get(name) != other.get(name)]

"""Progress of a run, from the ends of its files: fast, whatever their length."""

import dataclasses
import json
import math
from pathlib import Path
import time

from uae_jax import json_files, metrics_file
from uae_jax.files import append_line
from uae_jax.options import STAGES, Experiment, read_config

STARTS_FILE = "starts.jsonl"
# The files that `read_progress` opens; of all others it only asks whether they are there, and since when.
FILES_READ = ("config.json", STARTS_FILE, metrics_file.METRICS_FILE)


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is; None where it is not known yet.

  Attributes:
    workdir: folder of the run.
    state: "new" (nothing logged), "training", "evaluating" (the last stage is trained) or "finished".
    stage: folder of the stage, `<stage>` or `<stage>_round<k>`.
    step: number of updates logged in the stage.
    total_steps: number of updates in the stage.
    steps_per_second: rate in the last logged steps.
    eta_seconds: seconds to the end of the stage at this rate.
    idle_seconds: seconds since the run last wrote a file.
    last_save: step of the newest checkpoint of the stage.
    restarts: starts after the first.
    goodput: useful seconds per wall second, from the first start to the last file.
  """

  workdir: str
  state: str
  stage: str | None = None
  step: int | None = None
  total_steps: int | None = None
  steps_per_second: float | None = None
  eta_seconds: float | None = None
  idle_seconds: float | None = None
  last_save: int | None = None
  restarts: int | None = None
  goodput: float | None = None


def read_progress(workdir: str | Path, now: float | None = None) -> Progress:
  """Reads the progress of a run.

  Args:
    workdir: folder of the run.
    now: seconds since 1970; default: the clock.

  Raises:
    ValueError: the folder is not the workdir of a run, or its config cannot be read.
  """
  workdir = Path(workdir)
  config = config_of(workdir)
  starts = _lines(workdir / STARTS_FILE)
  file = workdir / metrics_file.METRICS_FILE
  records = metrics_file.tail(file) if file.exists() else []
  written = [path.stat().st_mtime for path in (file, workdir / "config.json") if path.exists()]
  written += [path.stat().st_mtime for path in (workdir / "evaluation").glob("*.json")]
  finished = is_finished(workdir, config)
  progress = Progress(
    str(workdir),
    state="finished" if finished else "new",
    idle_seconds=max(0.0, (time.time() if now is None else now) - max(written)),
    restarts=max(0, len(starts) - 1) if starts else None,
  )
  records = [record for record in records if record["stage"] in STAGES]
  if not records:
    return progress
  last = records[-1]
  folder = f"{last['stage']}_round{last['round']}" if last["round"] else last["stage"]
  total = config.section(last["stage"]).total_steps
  steps = saved_steps(workdir, folder)
  is_trained = any((workdir / "checkpoints" / folder / str(step) / "params").exists() for step in steps)
  seconds, useful = _last(records, "seconds_step"), _last(records, "useful_seconds")
  wall = max(written) - starts[0]["time"] if starts else 0.0
  state = "finished" if finished else "evaluating" if is_trained else "training"
  return dataclasses.replace(
    progress,
    state=state,
    stage=folder,
    step=last["step"],
    total_steps=total,
    steps_per_second=1 / seconds if seconds else None,
    eta_seconds=(total - last["step"]) * seconds if seconds and state == "training" else None,
    last_save=max(steps, default=None),
    goodput=min(1.0, useful / wall) if useful and wall > 0 else None,
  )


def record_start(workdir: Path, time: float, **about) -> None:
  """Appends a line to `starts.jsonl`, when a process starts or resumes training.

  Args:
    workdir: folder of the run.
    time: when the process started, in seconds since 1970.
    **about: what else is known about this start.
  """
  append_line(workdir / STARTS_FILE, json.dumps({"time": round(time, 3)} | about))


def config_of(workdir: Path) -> Experiment:
  """The config of a run.

  Raises:
    ValueError: the folder is not the workdir of a run, or its config cannot be read.
  """
  file = workdir / "config.json"
  if not file.exists():
    raise ValueError(f"{workdir} holds no config.json: it is not the workdir of a run")
  content = json_files.read_object(file)
  try:
    content.pop("config_version", None)
    return read_config(content)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def saved_steps(workdir: Path, folder: str) -> list[int]:
  """Steps of the complete checkpoints of a stage."""
  return [int(path.name) for path in (workdir / "checkpoints" / folder).glob("*") if path.name.isdecimal()]


def is_finished(workdir: Path, config: Experiment) -> bool:
  """Whether the last stage of a run is trained, and evaluated if the config says so."""
  folder = config.runs[-1][0]
  is_trained = any(
    (workdir / "checkpoints" / folder / str(step) / "params").exists() for step in saved_steps(workdir, folder)
  )
  return is_trained and (not config.evaluation.num_images or (workdir / "evaluation" / f"{folder}.json").exists())


def _last(records: list[dict], name: str) -> float | None:
  """The last positive number of this name; a damaged line may hold anything."""
  values = (record.get(name) for record in reversed(records))
  return next((value for value in values if type(value) in (int, float) and 0 < value < math.inf), None)


def _lines(file: Path) -> list[dict]:
  """The complete lines of a short JSON lines file."""
  found = []
  for line in file.read_bytes().splitlines() if file.exists() else ():
    try:
      found.append(json.loads(line))
    except (ValueError, RecursionError):
      continue  # the process was killed while writing it
  return [record for record in found if isinstance(record, dict) and isinstance(record.get("time"), int | float)]

"""Writes the metrics of a run to `metrics.jsonl`, TensorBoard and other writers, and a progress bar on stderr."""

from collections.abc import Mapping, Sequence
import json
import math
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

from uae_jax import metrics_file
from uae_jax.files import append_line
from uae_jax.training.metric_writers import make

# Metrics shown beside the progress bar, if they are logged.
SHOWN = ("loss", "reward", "held_out_reward", "caption_recall", "caption_length")


class MetricWriter:
  """Writes the metrics of all stages of a run.

  For each stage, call `start_stage`, then `write` at every logging step, then `end_stage`. Stages have the names of
  their folders: `<stage>`, or `<stage>_round<k>` if the run has rounds.

  Args:
    workdir: folder of the run.
    enabled: False writes nothing; set it in one process only.
    tensorboard: whether to write TensorBoard summaries too.
    others: "wandb", or MODULE:FUNCTION, see `metric_writers.make`.
    config: plain config of the run, for the others.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    enabled: bool = True,
    *,
    tensorboard: bool = True,
    others: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
  ):
    self._file = Path(workdir) / metrics_file.METRICS_FILE
    self._enabled = enabled
    self._summaries: list[Any] = []
    self._bar = None
    self._started, self._seconds_before = time.monotonic(), 0.0
    self._useful_seconds, self._last_step = 0.0, 0
    if enabled:
      self._file.parent.mkdir(parents=True, exist_ok=True)
      if tensorboard:
        # With oneDNN on, TensorFlow prints a banner to stderr regardless of log level. It computes nothing here.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        from clu import metric_writers  # imports TensorFlow, which takes 20 s on a small machine

        self._summaries.append(metric_writers.AsyncWriter(metric_writers.SummaryWriter(os.fspath(workdir))))
      self._summaries += [make(name, Path(workdir), dict(config or {})) for name in others]

  def start_stage(self, stage: str, *, step: int, total_steps: int) -> None:
    """Starts or resumes a stage after `step` updates.

    Deletes the stage's lines after `step`, which an interrupted run wrote and this run will write again. `seconds` and
    `useful_seconds` continue from the last remaining line.

    Args:
      stage: name of the stage's folder.
      step: number of updates already done; 0 starts the stage again.
      total_steps: number of updates in the stage, for the ETA.
    """
    if not self._enabled:
      return
    totals = metrics_file.rewind(self._file, *split_round(stage), step)
    self._seconds_before, self._useful_seconds = totals["seconds"], totals["useful_seconds"]
    self._started, self._last_step = time.monotonic(), step

    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    self._bar = tqdm(
      total=total_steps,
      initial=step,
      desc=stage,
      unit="step",
      file=sys.stderr,
      dynamic_ncols=is_terminal,
      # Updates are rarer where each one adds a line to a log file.
      mininterval=0.2 if is_terminal else 15.0,
    )

  def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the metrics of one logging step and updates the progress bar.

    Args:
      stage: name of the stage's folder.
      step: number of updates done in this stage.
      metrics: scalars that `float` accepts; `seconds_*` are seconds per update. The metric `seconds`, the wall time of
        the run so far without interruptions, is added, and its part within the steps that count, `useful_seconds`.
    """
    if not self._enabled:
      return
    name, round_number = split_round(stage)
    seconds = round(self._seconds_before + time.monotonic() - self._started, 3)
    self._useful_seconds += float(metrics.get("seconds_step", 0.0)) * (step - self._last_step)
    self._last_step = step if "seconds_step" in metrics else self._last_step
    totals = {"seconds": seconds, "useful_seconds": round(self._useful_seconds, 3)}
    scalars = {metric: float(value) for metric, value in metrics.items()} | totals
    # JSON has no NaN: non-finite values are written as null.
    finite = {metric: value if math.isfinite(value) else None for metric, value in scalars.items()}
    append_line(self._file, json.dumps({"stage": name, "step": int(step), "round": round_number} | finite))
    for summaries in self._summaries:
      summaries.write_scalars(int(step), {f"{stage}/{metric}": value for metric, value in scalars.items()})
    if self._bar is not None:
      shown = {metric: f"{scalars[metric]:.3g}" for metric in SHOWN if metric in scalars}
      if shown:
        self._bar.set_postfix(shown, refresh=False)
      self._bar.update(int(step) - self._bar.n)

  def write_images(self, stage: str, step: int, images: Mapping[str, Any]) -> None:
    """Writes images to TensorBoard and the others; name -> uint8, or float in 0..1, [B, H, W, 3]."""
    for summaries in self._summaries:
      summaries.write_images(int(step), {f"{stage}/{name}": value for name, value in images.items()})

  def write_texts(self, stage: str, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts to TensorBoard and the others."""
    for summaries in self._summaries:
      summaries.write_texts(int(step), {f"{stage}/{name}": text for name, text in texts.items()})

  def end_stage(self, step: int | None = None) -> None:
    """Closes the stage's progress bar and flushes; `step` is the number of updates if the stage is finished."""
    if self._bar is not None:
      if step is not None:
        self._bar.total = step
        self._bar.refresh()
      self._bar.close()
      self._bar = None
    for summaries in self._summaries:
      summaries.flush()

  def close(self) -> None:
    """Writes everything that is still buffered and closes the files; also called after an interruption."""
    self.end_stage()
    while self._summaries:
      self._summaries.pop().close()


def split_round(stage: str) -> tuple[str, int]:
  """Splits the name of a stage's folder: "name_round2" -> ("name", 2); the round is 0 if the run has no rounds."""
  match = re.fullmatch(r"(.+)_round(\d+)", stage)
  return (match[1], int(match[2])) if match else (stage, 0)

"""Measurement of a case: seconds of repeated runs and peak memory."""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
import statistics
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
  """One workload of one backend, ready to run.

  Attributes:
    run: does the work once and blocks until it is finished.
    unit: unit of the output, such as "captions".
    amount: units per run.
    flops: FLOPs of matrix products and convolutions per run; None if not counted.
    bytes: minimum bytes read from memory per run, for bandwidth-bound work; else None.
    check: returns values on which all backends must agree, given the same weights and inputs; None if there are none.
    facts: further results. For cases of a scaling curve: "axis", the quantity that varies; "x", its value; "series",
      the curve's name if an axis has several; "temporaries_mb" and "resident_mb", the compiled program's memory per
      device for temporaries and for arguments.
    seconds_compile: compile time of a program that was compiled ahead of its first run; None derives it from the first
      run.
    is_once: measure one run, without runs that warm up, because it takes long and its results matter, not its time.
  """

  run: Callable[[], Any]
  unit: str
  amount: float
  flops: float | None = None
  bytes: float | None = None
  check: Callable[[], Sequence[float]] | None = None
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)
  seconds_compile: float | None = None
  is_once: bool = False


def timed(function: Callable[[], Any]) -> tuple[float, float]:
  """Times one call: (wall seconds, processor seconds over all threads).

  Processor time depends little on other load, so it can compare backends on a busy machine. It includes threads that
  spin while waiting.
  """
  wall, processor = time.perf_counter(), time.process_time()
  function()
  return time.perf_counter() - wall, time.process_time() - processor


def summary(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
  """Median, extremes and number of repeated runs: wall seconds, and the median of processor seconds."""
  walls, processors = zip(*samples, strict=True)
  return {
    "seconds": statistics.median(walls),
    "fastest": min(walls),
    "slowest": max(walls),
    "processor_seconds": statistics.median(processors),
    "repeats": len(samples),
  }


class Memory:
  """Peak memory in MB between `start` and `peak`: of the device if it counts its memory, else of the process.

  On the host the peak is Linux's high-water mark of the process, which it can reset.
  """

  def __init__(self, backend: str):
    self._device = None
    if backend == "uae_jax":
      import jax

      device = jax.local_devices()[0]
      if device.memory_stats():
        # XLA never resets it, so it is correct only for the largest case so far: cases of a suite grow.
        self._device = lambda: device.memory_stats()["peak_bytes_in_use"]
        self._reset = lambda: None
    else:
      import torch

      if torch.cuda.is_available():
        self._device, self._reset = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats

  def start(self) -> float:
    """Resets the high-water mark if possible; returns the memory in use, in MB."""
    if self._device is not None:
      self._reset()
      return self._device() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")

  def peak(self) -> float:
    return _status("VmHWM") if self._device is None else self._device() / 1e6


def _status(name: str) -> float:
  """Value of a line of /proc/self/status, in MB."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))

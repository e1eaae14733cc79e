"""How a case is measured: seconds of repeated runs, and the memory that they need at most."""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
import statistics
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
  """One piece of work of one backend, ready to run.

  Attributes:
    run: does the work once and waits for its end.
    unit: what it makes, "captions" for instance.
    amount: how many of them a run makes.
    flops: multiplications and additions of matrix products and convolutions a run; None where nobody counted.
    bytes: that a run must at least move from memory, for work that the bandwidth bounds; else None.
    check: numbers that all backends must agree on, from the same weights and inputs; None where nothing compares.
    facts: anything else worth writing down. Where cases make a curve: "axis", what grows; "x", how large it is;
      "series", which of several curves of the axis, if so; "temporaries_mb" and "resident_mb", what the compiled
      program plans to hold on a device, beside its arguments and in them.
    seconds_compile: of a program that was compiled before its first run; else the first run tells.
  """

  run: Callable[[], Any]
  unit: str
  amount: float
  flops: float | None = None
  bytes: float | None = None
  check: Callable[[], Sequence[float]] | None = None
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)
  seconds_compile: float | None = None


def timed(function: Callable[[], Any]) -> tuple[float, float]:
  """(seconds on the wall, seconds of processor time over all threads) of one call.

  The second hardly knows what else a machine does, so it compares backends on a busy one; waiting threads that spin
  count in it.
  """
  wall, processor = time.perf_counter(), time.process_time()
  function()
  return time.perf_counter() - wall, time.process_time() - processor


def summary(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
  """Median, extremes and number of repeated runs, in seconds; medians of wall and of processor."""
  walls, processors = zip(*samples, strict=True)
  return {
    "seconds": statistics.median(walls),
    "fastest": min(walls),
    "slowest": max(walls),
    "processor_seconds": statistics.median(processors),
    "repeats": len(samples),
  }


class Memory:
  """Peak memory in MB of what runs between `start` and `peak`: of the device where it keeps count, else of the process.

  On the host the peak is Linux's high-water mark, which a process may reset.
  """

  def __init__(self, backend: str):
    self._device = None
    if backend == "uae_jax":
      import jax

      device = jax.local_devices()[0]
      if device.memory_stats():
        # Never reset by XLA: right for the largest case so far.
        self._device = lambda: device.memory_stats()["peak_bytes_in_use"]
        self._reset = lambda: None
    else:
      import torch

      if torch.cuda.is_available():
        self._device, self._reset = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats

  def start(self) -> float:
    """Resets the mark where that is possible; returns what is in use, MB."""
    if self._device is not None:
      self._reset()
      return self._device() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")

  def peak(self) -> float:
    return _status("VmHWM") if self._device is None else self._device() / 1e6


def _status(name: str) -> float:
  """MB of a line of /proc/self/status."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))

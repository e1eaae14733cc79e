"""Parent side of the worker processes of a suite."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
import queue
import subprocess
import sys
import threading
import time

from benchmarks.native import mkl
from benchmarks.sizes import MKL_NATIVE, SIZES

# A single malloc arena that retains its memory, for all backends: otherwise every run requests pages for its
# temporaries from the kernel again, which takes 0.2 to 0.5 s per run.
ALLOCATOR = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": "8589934592",
  "MALLOC_TOP_PAD_": "268435456",
}
# Memory is taken as it is needed, so that the context of a backend that waits takes none; one backend may use nearly
# all of it, and none loses it to fragments.
ACCELERATOR = {
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
  "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
# Level 4 times every candidate and checks its values. Triton may compute any product that it computes fastest.
XLA_GPU_FLAGS = "--xla_gpu_autotune_level=4 --xla_gpu_triton_gemm_any=true"
VIRTUAL_DEVICES = 8  # in the suite `devices` on a CPU
LEARNING_START = "BENCHMARKS_LEARNING_START"


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the processes of a run are started.

  Attributes:
    folder: holds a folder of shared weights per size, and all that the processes write.
    threads: CPU cores per process.
    xla_flags: added to XLA_FLAGS.
    learning_start: weights that the suite `learning` starts from; None if there are none.
  """

  folder: Path
  threads: int
  xla_flags: str = ""
  learning_start: Path | None = None


def environment(suite: str, size: str, backend: str, settings: Settings) -> dict[str, str]:
  """Environment of a suite's processes, which write only into the folder of the settings."""
  # Compile times are measured, so no cache may be used. PyTorch has its own cache in TMPDIR.
  variables = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
  variables |= ACCELERATOR if SIZES[size].is_accelerator else ALLOCATOR
  variables["TMPDIR"] = str(settings.folder)
  flags = [variables.get("XLA_FLAGS", ""), settings.xla_flags]
  if suite == "devices":
    flags.append(f"--xla_force_host_platform_device_count={VIRTUAL_DEVICES}")
  variables["XLA_FLAGS"] = " ".join(flag for flag in flags if flag)
  if settings.learning_start is not None:
    variables[LEARNING_START] = str(settings.learning_start)
  if backend.endswith(MKL_NATIVE):
    variables["LD_PRELOAD"] = " ".join(filter(None, (str(mkl.library()), variables.get("LD_PRELOAD"))))
  return variables


class BackendError(RuntimeError):
  """A backend could not run a case; the message is its own error."""


class OutOfTime(Exception):
  """The time of this run ended before an answer."""


class Clock:
  """Limits of time: one for the whole run, and one for each case.

  Args:
    seconds: length of the run; None for no limit.
    case_seconds: length of a case.
  """

  def __init__(self, seconds: float | None = None, case_seconds: float = 3600.0):
    self._end = float("inf") if seconds is None else time.monotonic() + seconds
    self._case_seconds = case_seconds
    self.start_case()

  def start_case(self) -> None:
    self._case_end = time.monotonic() + self._case_seconds

  def wait(self, get):
    """Calls get(seconds left).

    Raises:
      OutOfTime: the run has no time left.
      BackendError: the case has none.
    """
    left = min(self._end, self._case_end) - time.monotonic()
    try:
      return get(max(left, 0.0))
    except queue.Empty:
      if self._end < self._case_end:
        raise OutOfTime from None
      raise BackendError(f"no answer within {self._case_seconds:.0f} s") from None


class Backend:
  """One worker process, as a context manager that ends it. It imports its libraries at once, and waits to be opened."""

  def __init__(self, suite: str, name: str, size: str, settings: Settings, log):
    self.suite, self.name, self.size, self._settings, self._log = suite, name, size, settings, log
    self.about: dict = {}
    self._start()

  def _start(self) -> None:
    command = [sys.executable, "-m", "benchmarks.worker", "--suite", self.suite, "--backend", self.name]
    command += ["--size", self.size, "--folder", str(self._settings.folder / self.size)]
    command += ["--threads", str(self._settings.threads)]
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
      env=environment(self.suite, self.size, self.name, self._settings),
    )
    self._lines: queue.Queue = queue.Queue()
    threading.Thread(target=self._read, args=(self._process.stdout, self._lines), daemon=True).start()

  @staticmethod
  def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
      lines.put(line)
    lines.put(None)

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=60 if kind is None else 1)
    except subprocess.TimeoutExpired:
      self._kill()

  def _kill(self) -> None:
    self._process.kill()
    self._process.wait()

  def open(self, clock: Clock) -> list[str]:
    """Names of the cases. Starts the process again if it has ended or did not answer."""
    if self._process.poll() is not None:
      self._start()
    answer = self.ask("open", clock)
    self.about = answer["about"]
    return answer["cases"]

  @property
  def is_alive(self) -> bool:
    return self._process.poll() is None

  def ask(self, command: str, clock: Clock, *values: str):
    """Sends a command and returns its answer.

    Raises:
      BackendError: the command failed, or the process ended, or it did not answer in time and was ended.
      OutOfTime: the run has no time left; the process was ended.
    """
    with contextlib.suppress(BrokenPipeError):  # The process has ended; reading the answer reports how.
      self._process.stdin.write(json.dumps([command, *values]) + "\n")
      self._process.stdin.flush()
    try:
      line = clock.wait(lambda seconds: self._lines.get(timeout=seconds))
    except (BackendError, OutOfTime):
      self._kill()
      raise
    if line is None:
      raise BackendError(f"the process ended with code {self._process.wait()}")
    answer = json.loads(line)
    if "error" in answer:
      raise BackendError(answer["error"])
    return answer

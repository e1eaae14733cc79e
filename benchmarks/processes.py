"""Parent side of the worker processes of a suite."""

import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys

# A single malloc arena that retains its memory, for all backends: otherwise every run requests pages for its
# temporaries from the kernel again, which takes 0.2 to 0.5 s per run.
ALLOCATOR = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": "8589934592",
  "MALLOC_TOP_PAD_": "268435456",
}
VIRTUAL_DEVICES = 8  # in the suite `devices` on a CPU


def environment(suite: str, folder: Path) -> dict[str, str]:
  """Environment of a suite's processes, which write only into `folder`."""
  # Compile times are measured, so no cache may be used. PyTorch has its own cache in TMPDIR.
  variables = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
  variables |= ALLOCATOR | {"TMPDIR": str(folder)}
  if suite == "devices":
    flags = variables.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={VIRTUAL_DEVICES}"
    variables["XLA_FLAGS"] = " ".join(flags).strip()
  return variables


class BackendError(RuntimeError):
  """A backend could not run a case; the message is its own error."""


class Backend:
  """One worker process, as a context manager that ends it."""

  def __init__(self, suite: str, name: str, size: str, folder: Path, threads: int, log):
    self.name = name
    command = [sys.executable, "-m", "benchmarks.worker", "--suite", suite, "--backend", name, "--size", size]
    command += ["--folder", str(folder), "--threads", str(threads)]
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(suite, folder)
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=60)
    except subprocess.TimeoutExpired:
      self._process.kill()

  def cases(self) -> list[str]:
    """Names of the cases; blocks until the process has started."""
    return self._answer()

  def ask(self, command: str, name: str) -> dict:
    with contextlib.suppress(BrokenPipeError):  # The process has ended; reading the answer reports how.
      self._process.stdin.write(json.dumps([command, name]) + "\n")
      self._process.stdin.flush()
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      raise BackendError(f"the process ended with code {self._process.wait()}")
    answer = json.loads(line)
    if isinstance(answer, dict) and "error" in answer:
      raise BackendError(answer["error"])
    return answer

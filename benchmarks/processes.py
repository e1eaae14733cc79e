"""The worker processes of a suite as the parent sees them."""

import json
import os
from pathlib import Path
import subprocess
import sys


class BackendError(RuntimeError):
  """A backend could not do a case; the text is its own error."""


class Backend:
  """One worker process; `with` ends it."""

  def __init__(self, suite: str, name: str, size: str, folder: Path, threads: int, log):
    self.name = name
    command = [sys.executable, "-m", "benchmarks.worker", "--suite", suite, "--backend", name, "--size", size]
    command += ["--folder", str(folder), "--threads", str(threads)]
    # Compile times are measured: nothing may come from a cache.
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.stdin.close()
    self._process.wait(timeout=60)

  def cases(self) -> list[str]:
    """Names of the cases; waits until the process has started."""
    return self._answer()

  def ask(self, command: str, name: str) -> dict:
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

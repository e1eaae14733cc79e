"""Builds the library that lets MKL use its best kernels on processors of other makers than Intel."""

from pathlib import Path
import shutil
import subprocess
import tempfile

SOURCE = Path(__file__).with_name("mkl_as_intel.c")


def library() -> Path:
  """The shared library to preload; compiled on first use, into the folder of temporary files.

  Raises:
    ValueError: there is no C compiler, or it fails.
  """
  target = Path(tempfile.gettempdir()) / "benchmarks_mkl_as_intel.so"
  if target.exists() and target.stat().st_mtime >= SOURCE.stat().st_mtime:
    return target
  compiler = shutil.which("cc") or shutil.which("gcc")
  if compiler is None:
    raise ValueError("--torch-mkl native: needs a C compiler (cc or gcc); found none")
  command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(target), str(SOURCE)]
  built = subprocess.run(command, capture_output=True, text=True)
  if built.returncode:
    raise ValueError(f"--torch-mkl native: {compiler} failed: {built.stderr.strip()[:200]}")
  return target

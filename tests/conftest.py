"""Gives every test 8 virtual CPU devices and full float32 matmuls, set before anything initializes a JAX backend.

All processes of a test session share a compilation cache, which stays for the next session: compiling takes most of the
time of the tests.
"""

import os
from pathlib import Path
import platform
import shutil

from uae_jax.files import cache_folder

# Programs use the instructions of this machine's processor, and several machines may share a home folder.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "tests" / platform.node()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight virtual devices on two busy cores may wait for each other for more than XLA's default limit of 40 s.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flax
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
flax.config.update("flax_always_shard_variable", False)

# Tests compile for longer than they compute. LLVM's level 1 saves a quarter of it, and contracts a * b + c as level
# 3 does; XLA's own passes are the same. XLA reads the flags once, so runs in processes of their own keep theirs.
flags = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {flags}"
jax.devices()
os.environ["XLA_FLAGS"] = flags


def pytest_sessionstart(session):
  """Empties the compilation cache when it has 2 GB.

  JAX's own limit is not used: it reads the whole folder for every program, and fails on what a killed test left behind.
  """
  folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
  is_worker = hasattr(session.config, "workerinput")
  if not is_worker and sum(file.stat().st_size for file in folder.glob("*")) > 2 * 2**30:
    shutil.rmtree(folder)


def pytest_ignore_collect(collection_path, config):
  """Skips files outside the fast tier before they are imported: importing their reference libraries takes 20 s."""
  if config.option.markexpr == "fast" and collection_path.name.startswith("test_"):
    return "pytest.mark.fast" not in collection_path.read_text() or None
  return None

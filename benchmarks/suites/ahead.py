"""Ahead-of-time compilation, which reports compile time and planned memory."""

from collections.abc import Callable
import time
from typing import Any

import jax


def compile_ahead(function: Callable, arguments: tuple, **options) -> tuple[Callable, dict[str, Any]]:
  """Compiles `jax.jit(function, **options)` for these arguments; returns (program, fields of its `Case`).

  The fields are the seconds of tracing and compiling, and, as facts, the program's memory per device.
  """
  start = time.perf_counter()
  compiled = jax.jit(function, **options).lower(*arguments).compile()
  seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
  facts = {
    "temporaries_mb": memory.temp_size_in_bytes / 1e6,
    "resident_mb": memory.argument_size_in_bytes / 1e6,
  }
  return compiled, {"seconds_compile": seconds, "facts": facts}

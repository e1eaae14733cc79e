"""Passes compiler flags of a config to XLA and libtpu, which read them from the environment."""

import os

from uae_jax.options import Experiment
from uae_jax.options.experiment import check_xla_flags


def add(config: Experiment) -> None:
  """Prepends the config's flags to XLA_FLAGS and LIBTPU_INIT_ARGS; flags of the environment come later and win.

  Must be called before the first use of a device.

  Raises:
    ValueError: XLA_FLAGS has a flag of libtpu, with which XLA would end the process.
  """
  check_xla_flags(os.environ.get("XLA_FLAGS", ""), "the environment's XLA_FLAGS", "LIBTPU_INIT_ARGS")
  for variable, flags in (("XLA_FLAGS", config.xla_flags), ("LIBTPU_INIT_ARGS", config.libtpu_init_args)):
    both = f"{flags} {os.environ.get(variable, '')}".strip()
    if both:
      os.environ[variable] = both


def in_effect() -> dict[str, str]:
  """The flags of this process, those of the environment included: variable -> flags."""
  return {variable: os.environ[variable] for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(variable)}

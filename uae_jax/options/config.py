"""Between the typed `Experiment` and the `ml_collections.ConfigDict` that config files write and commands override."""

from collections.abc import Mapping
import dataclasses
from typing import TYPE_CHECKING, Any

from uae_jax import plain
from uae_jax.options.experiment import Experiment

if TYPE_CHECKING:
  from ml_collections import ConfigDict


def new_config() -> "ConfigDict":
  """A config with every field of `Experiment` at its default; config files change what differs."""
  from ml_collections import ConfigDict  # Imported late: only config files need it.

  return ConfigDict(_fields(Experiment()))


def read_config(config: "ConfigDict | Mapping") -> Experiment:
  """The typed and checked config.

  Raises:
    ValueError: an unknown field, a value of another type, or one that is out of range; the message names the field.
  """
  mapping = config if isinstance(config, Mapping) else config.to_dict()
  return plain.from_plain(Experiment, mapping, "config")


def _fields(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return {field.name: _fields(getattr(value, field.name)) for field in dataclasses.fields(value)}
  return dict(value) if isinstance(value, Mapping) else value

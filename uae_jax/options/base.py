"""What every group of options shares: documented fields with ranges, checked when the object is made.

An error message starts with the name of the field, so that a reader of a nested config can put the path before it:
`clip_low = -3.0: expected 0 or more` becomes `config.generation_for_understanding.objective.clip_low = ...`.
"""

import dataclasses
import math
import re
from typing import Any

from uae_jax import plain
from uae_jax.files import input_path, local_path

_LIMITS = {
  "at_least": ("{} or more", lambda value, limit: value >= limit),
  "more_than": ("more than {}", lambda value, limit: value > limit),
  "at_most": ("{} or less", lambda value, limit: value <= limit),
  "less_than": ("less than {}", lambda value, limit: value < limit),
}


def option(
  default: Any,
  *,
  choices: tuple[str, ...] = (),
  is_path: bool = False,
  is_input: bool = False,
  is_regex: bool = False,
  **limits: float,
) -> Any:
  """A dataclass field with a range.

  Args:
    default: the field's default.
    choices: the allowed values; empty allows all.
    is_path: the value is a path of this machine; see `files.local_path`.
    is_input: the value is a path that is only read, which may be in a bucket; see `files.input_path`.
    is_regex: whether the value is a regular expression.
    **limits: any of at_least, more_than, at_most, less_than.
  """
  unknown = set(limits) - set(_LIMITS)
  if unknown:
    raise TypeError(f"option() has no limit {sorted(unknown)}")
  metadata = {"choices": choices, "is_path": is_path, "is_input": is_input, "is_regex": is_regex, "limits": limits}
  return dataclasses.field(default=default, metadata=metadata)


def describe_range(field: dataclasses.Field) -> str:
  """The range of a field in words, such as "0 or more and less than 1"; "" if every value is allowed."""
  if field.metadata.get("choices"):
    return "one of " + ", ".join(map(repr, field.metadata["choices"]))
  limits = field.metadata.get("limits", {})
  return " and ".join(_LIMITS[name][0].format(limit) for name, limit in limits.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Base class of all options. Subclasses add `check` for rules between several fields."""

  def __post_init__(self):
    cls: type = type(self)  # mypy takes type[Options] for unhashable
    kinds = plain.annotations(cls)
    for field in dataclasses.fields(self):
      value = plain.from_plain(kinds[field.name], getattr(self, field.name), field.name)
      object.__setattr__(self, field.name, value)
      choices, limits = field.metadata.get("choices"), field.metadata.get("limits", {})
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field.name} = {value}: expected a finite number")
      if value is None:
        continue
      if field.metadata.get("is_regex"):
        try:
          re.compile(value)
        except re.error as error:
          raise ValueError(f"{field.name} = {value!r}: expected a regular expression ({error})") from error
      is_outside = any(not _LIMITS[name][1](value, limit) for name, limit in limits.items())
      if is_outside or (choices and value not in choices):
        raise ValueError(f"{field.name} = {value!r}: expected {describe_range(field)}")
      is_input = field.metadata.get("is_input", False)
      if is_input or field.metadata.get("is_path"):
        self.replace_path(field.name, value, is_input=is_input)
    self.check()

  def replace_path(self, name: str, value: str, prefix: str = "", *, is_input: bool = False) -> None:
    """Sets a field to `prefix` and a path in which `~` is expanded.

    Raises:
      ValueError: the path is an address, or for an input one outside of a bucket; the message starts with the name of
        the field.
    """
    try:
      object.__setattr__(self, name, prefix + (input_path if is_input else local_path)(value))
    except ValueError as error:
      raise ValueError(f"{name} = {error}") from error

  def check(self) -> None:
    """Checks rules between several fields.

    Raises:
      ValueError: the message starts with the name of a field.
    """

  def is_default(self, name: str) -> bool:
    """Whether a field has the default of this class or of the class that declares it first."""
    defaults = []
    for cls in type(self).__mro__:
      if dataclasses.is_dataclass(cls):
        defaults += [field.default for field in dataclasses.fields(cls) if field.name == name]
    return getattr(self, name) in defaults

  def refuse_inert(self, names: tuple[str, ...], where: str) -> None:
    """Refuses fields that were changed although they do nothing here.

    Args:
      names: fields of these options.
      where: the setting that makes them inert, as it ends the sentence "... does nothing with ...".

    Raises:
      ValueError: one of the fields differs from its default.
    """
    for name in names:
      if not self.is_default(name):
        raise ValueError(f"{name} = {getattr(self, name)!r} does nothing with {where}: remove it")

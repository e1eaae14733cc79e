"""Conversion of nested frozen dataclasses to plain JSON values, and back with every field checked."""

from collections.abc import Mapping
import dataclasses
import difflib
import functools
import types
import typing
from typing import Any

SCALARS = (bool, int, float, str)
KIND = "kind"


@dataclasses.dataclass(frozen=True, eq=False)
class ByKind:
  """Marks a field whose class is named by the plain value itself, under `kind`: `Annotated[AnyOfThem, ByKind(...)]`.

  Attributes:
    classes: kind -> dataclass without a field `kind`.
    default: the kind of a value that names none; it is not written.
  """

  classes: Mapping[str, type]
  default: str

  def to_plain(self, value: Any) -> dict[str, Any]:
    kind = next((kind for kind, cls in self.classes.items() if cls is type(value)), None)
    if kind is None:
      raise TypeError(f"{type(value).__name__} has no kind: expected one of {', '.join(self.classes)}")
    return ({} if kind == self.default else {KIND: kind}) | to_plain(value)

  def from_plain(self, value: Any, where: str) -> Any:
    if type(value) in self.classes.values():
      return value
    fields, kind = value, self.default
    if _is_mapping(value):
      fields = {name: item for name, item in value.items() if name != KIND}
      kind = from_plain(str, value.get(KIND, kind), _join(where, KIND))
    if kind not in self.classes:
      raise ValueError(f"{_join(where, KIND)} = {kind!r}: expected one of {', '.join(self.classes)}")
    return from_plain(self.classes[kind], fields, where)


def to_plain(value: Any) -> Any:
  """Converts a value to plain JSON values: dataclasses and mappings become dicts, tuples become lists.

  Raises:
    TypeError: the value contains something that JSON cannot represent.
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    hints = annotations(type(value))
    return {f.name: _field_to_plain(hints[f.name], getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
  if _is_mapping(value):
    return {str(name): to_plain(item) for name, item in value.items()}
  if isinstance(value, tuple | list):
    return [to_plain(item) for item in value]
  if value is None or isinstance(value, SCALARS):
    return value
  raise TypeError(f"{type(value).__name__} {value!r} has no plain form: expected dataclasses, tuples, dicts or scalars")


def from_plain(cls: Any, value: Any, where: str = "") -> Any:
  """Builds an object of a type from plain values; the inverse of `to_plain`.

  An instance of the expected dataclass is returned unchanged. Absent fields get their default. An int is accepted for a
  float and converted; a bool is not accepted as a number, and a string is never converted.

  Args:
    cls: a dataclass, or any annotation composed of dataclasses, scalars, tuples, dicts, `Literal`, `ByKind`, `Any` and
      unions.
    value: plain value, as in JSON or a `ConfigDict`.
    where: name of the value in error messages, for example "config".

  Raises:
    ValueError: a field is unknown or missing, or a value has the wrong type; the message names section and field.
  """
  origin, options = typing.get_origin(cls), typing.get_args(cls)
  if by_kind := _by_kind(cls):
    return by_kind.from_plain(value, where)
  if isinstance(cls, type) and dataclasses.is_dataclass(cls):
    return _dataclass(cls, value, where)
  if origin in (types.UnionType, typing.Union):
    return _union(options, value, where)
  if origin is typing.Literal:
    if not any(value == option and type(value) is type(option) for option in options):
      raise ValueError(f"{_name(where)} = {value!r}: expected one of {', '.join(map(repr, options))}")
    return value
  if cls is Any:
    return _untyped(value)
  if cls is tuple or origin is tuple:
    return _tuple(options, value, where)
  if cls is dict or origin is dict or origin is Mapping:
    if not _is_mapping(value):
      raise _mismatch(where, value, "a mapping")
    kind = options[1] if options else Any
    return {name: from_plain(kind, item, _join(where, name)) for name, item in value.items()}
  if cls in (None, types.NoneType):
    if value is not None:
      raise _mismatch(where, value, "nothing")
    return None
  if cls in SCALARS:
    return _scalar(cls, value, where)
  raise TypeError(f"{_name(where)}: fields of type {cls!r} cannot be read from plain values")


def _field_to_plain(hint: Any, value: Any) -> Any:
  by_kind = _by_kind(hint)
  return to_plain(value) if by_kind is None else by_kind.to_plain(value)


def _by_kind(hint: Any) -> ByKind | None:
  return next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, ByKind)), None)


def _dataclass(cls: type, value: Any, where: str) -> Any:
  if isinstance(value, cls):
    return value
  if not _is_mapping(value):
    raise _mismatch(where, value, f"the fields of {cls.__name__}")
  fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
  for name in value:
    if name not in fields:
      nearest = difflib.get_close_matches(str(name), fields, n=1)
      advice = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(fields)}"
      raise ValueError(f"{_name(where or cls.__name__)} has no field {name!r}: {advice}")
  hints = annotations(cls)
  given = {name: from_plain(hints[name], item, _join(where, name)) for name, item in value.items()}
  for name, field in fields.items():
    has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
    if name not in given and not has_default:
      raise ValueError(f"{_name(where or cls.__name__)} lacks field {name!r}, which has no default")
  try:
    return cls(**given)
  except ValueError as error:  # A value out of range; the message starts with the name of its field.
    raise ValueError(_join(where, error)) from error


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
  """The types of a dataclass's fields."""
  return typing.get_type_hints(cls, include_extras=True)


def _union(options: tuple, value: Any, where: str) -> Any:
  if value is None and types.NoneType in options:
    return None
  others = [option for option in options if option is not types.NoneType]
  if len(others) == 1:
    return from_plain(others[0], value, where)
  # Try the exact type first: in `float | int`, 3 stays an int.
  others.sort(key=lambda option: type(value) is not option)
  for option in others:
    try:
      return from_plain(option, value, where)
    except ValueError:
      continue
  raise _mismatch(where, value, " or ".join(getattr(option, "__name__", str(option)) for option in options))


def _tuple(kinds: tuple, value: Any, where: str) -> tuple:
  if not isinstance(value, list | tuple):
    raise _mismatch(where, value, "a list")
  if not kinds:
    return _untyped(value)
  if len(kinds) == 2 and kinds[1] is Ellipsis:
    kinds = (kinds[0],) * len(value)
  elif kinds == ((),):
    kinds = ()
  if len(kinds) != len(value):
    raise ValueError(f"{_name(where)} = {value!r}: expected {len(kinds)} values, found {len(value)}")
  return tuple(from_plain(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _scalar(kind: type, value: Any, where: str) -> Any:
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  # bool is a subclass of int, but not accepted as a number.
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise _mismatch(where, value, kind.__name__)
  return value


def _untyped(value: Any) -> Any:
  """Converts lists to tuples at every level, which makes the result hashable if its items are."""
  if isinstance(value, list | tuple):
    return tuple(_untyped(item) for item in value)
  if _is_mapping(value):
    return {name: _untyped(item) for name, item in value.items()}
  return value


def _is_mapping(value: Any) -> bool:
  """Whether a value has named items; `ml_collections.ConfigDict` is not a `Mapping`."""
  return hasattr(value, "keys") and hasattr(value, "items")


def _join(where: str, name: object) -> str:
  return f"{where}.{name}" if where else str(name)


def _name(where: str) -> str:
  return where or "value"


def _mismatch(where: str, value: Any, expected: str) -> ValueError:
  return ValueError(f"{_name(where)} = {value!r}: expected {expected}, found {type(value).__name__}")

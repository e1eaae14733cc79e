"""The points of a sweep: what each run changes, from the config's `sweep(add)`, from grids and from random draws."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
import itertools
import math
import random
import re
from typing import Any

# (field, text) as on the command line.
Overrides = tuple[tuple[str, str], ...]
DRAWS_PER_POINT = 100
DRAW = re.compile(r"(uniform|loguniform|integer|choice)\((.*)\)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    name: name of its folder.
    overrides: (field, text) as on the command line; a text may contain the values of other fields, "seed-{seed}".
  """

  name: str
  overrides: Overrides

  @property
  def flags(self) -> list[str]:
    """Flags of `uae-jax train`."""
    values = dict(self.overrides)
    return [f"--config.{field}={insert(text, values)}" for field, text in self.overrides]


def insert(text: str, values: dict[str, str]) -> str:
  """Replaces "{field}" by the value of the field, where the run sets one."""
  return re.sub(r"\{([\w.]+)\}", lambda match: values.get(match[1], match[0]), text)


def from_config(sweep: Callable[[Callable[..., None]], None]) -> list[tuple[str, Overrides]]:
  """(name or "", overrides) of the points that a config's `sweep(add)` adds.

  Args:
    sweep: calls `add(**fields)` or `add(name, **fields)` per point; fields may have dots: `add(**{"a.b": 1})`.
  """
  found: list[tuple[str, Overrides]] = []

  def add(name: str | None = None, /, **fields: Any) -> None:
    found.append((name or "", tuple((field, as_text(value)) for field, value in fields.items())))

  sweep(add)
  return found


def as_text(value: Any) -> str:
  """A value as the text of a flag."""
  return value if isinstance(value, str) else repr(value)


def split_values(text: str) -> list[str]:
  """Splits at the commas that are outside brackets and quotes."""
  return [item.strip() for item in re.findall(r"(?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^][]*\]|\"[^\"]*\"|[^,])+", text)]


def grid(texts: Sequence[str]) -> list[Overrides]:
  """Every combination of the values of all grids.

  Args:
    texts: "config.FIELD=VALUE,VALUE,..." per field.

  Raises:
    ValueError: a text has another form, or a field has two grids.
  """
  axes = {}
  for text in texts:
    field, values = field_and_rest("--grid", text, "VALUE,VALUE,...")
    if field in axes:
      raise ValueError(f"--grid {text}: {field} has a grid already: give all its values in one")
    axes[field] = [(field, value) for value in split_values(values) if value]
    if not axes[field]:
      raise ValueError(f"--grid {text}: expected config.FIELD=VALUE,VALUE,...")
  return list(itertools.product(*axes.values()))


def draws(texts: Sequence[str], num: int, seed: int) -> list[Overrides]:
  """Random points, all different; the same texts and seed give the same ones, and the first of more are those of fewer.

  Args:
    texts: "config.FIELD=DISTRIBUTION" per field: uniform(LOW, HIGH), loguniform(LOW, HIGH), integer(LOW, HIGH) with
      both ends, or choice(A, B, ...).
    num: number of points.
    seed: seed of the draws.

  Raises:
    ValueError: a text has another form, a range is empty, a field is drawn twice, or there are fewer different points.
  """
  fields = {}
  for text in texts:
    field, rest = field_and_rest("--draw", text, "loguniform(LOW,HIGH)")
    if field in fields:
      raise ValueError(f"--draw {text}: {field} is drawn already")
    fields[field] = distribution(rest, text)
  generator = random.Random(seed)
  # A dict keeps the order. Points that were drawn before are drawn again.
  found: dict[Overrides, None] = {}
  for _ in range(num * DRAWS_PER_POINT if fields else 1):
    found[tuple((field, draw(generator)) for field, draw in fields.items())] = None
    if len(found) == num:
      break
  if fields and len(found) < num:
    raise ValueError(f"--num={num}: only {len(found)} different points were drawn from {', '.join(fields)}")
  return list(found)


def distribution(text: str, where: str) -> Callable[[random.Random], str]:
  """(generator) -> text of a value drawn from a distribution.

  Raises:
    ValueError: it is not a distribution.
  """
  match = DRAW.fullmatch(text.strip())
  problem = ValueError(
    f"--draw {where}: expected uniform(LOW,HIGH), loguniform(LOW,HIGH), integer(LOW,HIGH) or choice(A,B,...)"
  )
  if match is None:
    raise problem
  kind, items = match[1], split_values(match[2])
  if kind == "choice":
    if not items:
      raise problem
    return lambda generator: generator.choice(items)
  try:
    low, high = map(float, items)
    if (
      not -math.inf < low < high < math.inf
      or (kind == "loguniform" and low <= 0)
      or (kind == "integer" and (low % 1 or high % 1))
    ):
      raise problem
  except ValueError as error:
    raise problem from error
  if kind == "integer":
    return lambda generator: str(generator.randint(int(low), int(high)))
  if kind == "uniform":
    return lambda generator: f"{generator.uniform(low, high):.4g}"
  return lambda generator: f"{math.exp(generator.uniform(math.log(low), math.log(high))):.4g}"


def field_and_rest(flag: str, text: str, form: str) -> tuple[str, str]:
  """Splits "config.FIELD=REST".

  Raises:
    ValueError: the text has another form.
  """
  match = re.fullmatch(r"(?:--)?(?:config\.)?([\w.]+)=(.+)", text, re.DOTALL)
  if match is None:
    raise ValueError(f"{flag} {text}: expected config.FIELD={form}")
  return match[1], match[2]


def combine(bases: Iterable[tuple[str, Overrides]], *others: Iterable[Overrides]) -> list[Point]:
  """The points with every combination of the given overrides; later ones override earlier ones of the same field.

  Raises:
    ValueError: two points are the same.
  """
  points: dict[str, Point] = {}
  more = list(itertools.product(*others))
  for name, base in bases:
    for parts in more:
      added = dict(itertools.chain.from_iterable(parts))
      overrides = tuple((dict(base) | added).items())
      point = Point(folder_name(name, tuple(added.items()) if name else overrides), overrides)
      if point.name in points:
        raise ValueError(f"the sweep contains {point.name} twice: remove one of its points")
      points[point.name] = point
  return list(points.values())


def folder_name(name: str, overrides: Sequence[tuple[str, str]]) -> str:
  """A folder's name: the point's own name, and the last part of each field with its value; long ones are cut."""
  parts = [name] if name else []
  ends = [field.rpartition(".")[2] for field, _ in overrides]
  for field, text in overrides:
    end = field.rpartition(".")[2]
    parts.append(f"{end if ends.count(end) == 1 else field}-{text}")
  clean = re.sub(r"[^\w.-]+", "-", "_".join(parts) or "default").strip("-.")
  if len(clean) <= 80:
    return clean
  return f"{clean[:70]}-{hashlib.sha256('_'.join(parts).encode()).hexdigest()[:8]}"

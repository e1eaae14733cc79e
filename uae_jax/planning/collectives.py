"""Parses the text of a compiled program for its collectives and how often each runs."""

import collections
from collections.abc import Iterator
import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+)\[([\d,]*)\]")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
COLLECTIVE = re.compile(rf"=\s+(.*?)\s+({'|'.join(KINDS)})(-start)?\(")
CHANNEL = re.compile(r"channel_id=(\d+)")
LOOP = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
CALL = re.compile(r"\b(?:calls|to_apply|called_computations?|branch_computations|true_computation|false_computation)=")
NAME = re.compile(r"%([\w.\-]+)")
CONSTANT = re.compile(r"\bs32\[\](?:\{[^}]*\})? constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    bytes: size of its largest result on one device.
    times: executions per call of the program; a loop of unknown length counts as one iteration.
    is_in_loop: whether it runs inside a loop.
  """

  kind: str
  bytes: int
  times: int
  is_in_loop: bool


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """Splits a module's text into (name of the entry computation, name -> instructions)."""
  entry = ""
  found: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if line and not line[0].isspace() and line.rstrip().endswith("{") and not line.startswith("HloModule"):
      words = line.split()
      name = words[1 if words[0] == "ENTRY" else 0].lstrip("%")
      entry = name if words[0] == "ENTRY" else entry
      lines = found.setdefault(name, [])
    elif line.startswith(" "):
      lines.append(line)
  return entry, found


def collectives(text: str) -> list[Collective]:
  """All collectives of a compiled module (`compiled.as_text()`), each once even if fusions repeat it in the text."""
  entry, bodies = computations(text)
  times = executions(entry, bodies)
  found, seen = [], set()
  for name, lines in bodies.items():
    for line in lines:
      match = COLLECTIVE.search(line)
      if match is None or name not in times:
        continue
      channel = CHANNEL.search(line)
      key = (match[2], channel[1]) if channel else (name, line)
      if key in seen:
        continue
      seen.add(key)
      turns, is_in_loop = times[name]
      found.append(Collective(match[2], max(map(_size, ARRAY.findall(match[1])), default=0), turns, is_in_loop))
  return found


def executions(entry: str, bodies: dict[str, list[str]]) -> dict[str, tuple[int, bool]]:
  """name -> (executions per call, whether in a loop) of every computation reachable from the entry."""
  times: dict[str, tuple[int, bool]] = {}
  queue = collections.deque([(entry, 1, False)])
  while queue:
    name, turns, is_in_loop = queue.popleft()
    if name not in bodies or times.get(name, (0, False))[0] >= turns:
      continue
    times[name] = turns, is_in_loop
    for line in bodies[name]:
      loop = LOOP.search(line)
      if loop:
        queue.append((loop[2], turns * trip_count(loop[1], bodies), True))
      else:
        queue.extend((callee, turns, is_in_loop) for callee in callees(line))
  return times


def callees(line: str) -> Iterator[str]:
  for match in CALL.finditer(line):
    # Either one name or a list in braces.
    rest = line[match.end() :]
    yield from NAME.findall(rest[: rest.index("}")] if rest.startswith("{") else rest.split(",")[0].split()[0])


def trip_count(condition: str, bodies: dict[str, list[str]]) -> int:
  """The constant that a loop's counter is compared with; 1 if there is none."""
  lines = list(bodies.get(condition, ()))
  for line in bodies.get(condition, ()):
    for callee in callees(line):
      lines += bodies.get(callee, ())
  return max([int(value) for line in lines for value in CONSTANT.findall(line)] + [1])


def _size(array: tuple[str, str]) -> int:
  dtype, dims = array
  return BYTES.get(dtype, 4) * math.prod(int(dim) for dim in dims.split(",") if dim)


def summary(found: list[Collective]) -> dict[str, dict]:
  """kind -> count, count inside loops, bytes of the largest, and total bytes per call."""
  table = {}
  for kind in sorted({item.kind for item in found}):
    of_kind = [item for item in found if item.kind == kind]
    table[kind] = {
      "count": len(of_kind),
      "in_loops": sum(item.is_in_loop for item in of_kind),
      "largest_bytes": max(item.bytes for item in of_kind),
      "total_bytes": sum(item.bytes * item.times for item in of_kind),
    }
  return table

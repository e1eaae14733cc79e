"""The lines of `metrics.jsonl`: read in one pass with bounded memory, at any length and after any damage.

A line is `{"stage": NAME, "step": N, "round": K, metric: number or null, ..., "seconds": number}`.
"""

import dataclasses
import json
import os
from pathlib import Path
import re

METRICS_FILE = "metrics.jsonl"
# Lines of one stage that a report reads; a chart shows a few hundred points.
MOST_LINES = 3_000

# Most lines need not be parsed: JSON takes several microseconds per line.
_START = re.compile(rb'\{"stage": "([^"\\]+)", "step": (\d+), "round": (\d+)[,}]')
_SCATTER, _HASHES = 2654435761, 2**32
_NOT_FINITE = re.compile(rb'"(?:loss|reward|grad_norm)": null')


# (name of the stage, number of the round or 0 if the run has no rounds, step)
Header = tuple[str, int, int]


def header(line: bytes) -> Header | None:
  """Reads the header of a line; None for a line that is incomplete or damaged."""
  match = _START.match(line)
  if match and line.isascii() and line.endswith((b"}\n", b"}")) and line.count(b"{") == 1:
    return match[1].decode(), int(match[3]), int(match[2])
  record = parse(line)
  return None if record is None else (record["stage"], record["round"], record["step"])


def parse(line: bytes) -> dict | None:
  """Parses a line; None if it is incomplete or damaged."""
  try:
    record = json.loads(line)
    return record | {"stage": str(record["stage"]), "step": int(record["step"]), "round": int(record.get("round") or 0)}
  except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
    return None


@dataclasses.dataclass
class _Sample:
  """An even sample of a stage's lines, of which at most 2 * MOST_LINES are held.

  The first and the last line, and the first one with a loss, reward or gradient that is not finite, are always in it.
  """

  count: int = 0
  share: int = _HASHES
  lines: dict[int, bytes] = dataclasses.field(default_factory=dict)
  fixed: dict[int, bytes] = dataclasses.field(default_factory=dict)
  last: bytes = b""
  is_broken: bool = False

  def add(self, line: bytes) -> None:
    if not self.is_broken and b"null" in line and _NOT_FINITE.search(line):
      self.is_broken = True
      self.fixed[self.count] = line
    if self.count == 0:
      self.fixed[0] = line
    # Scattered lines: every k-th one could miss a metric that is logged at intervals.
    if self.count * _SCATTER % _HASHES < self.share:
      self.lines[self.count] = line
      if len(self.lines) > 2 * MOST_LINES:
        self.share //= 2
        self.lines = {i: kept for i, kept in self.lines.items() if i * _SCATTER % _HASHES < self.share}
    self.last = line
    self.count += 1

  def all(self) -> list[bytes]:
    chosen = self.lines | self.fixed | {self.count - 1: self.last}
    return [chosen[i] for i in sorted(chosen)]


def read(file: Path) -> tuple[list[dict], list[str]]:
  """Reads the lines of all stages; of a stage with many lines, an even sample of `MOST_LINES` to 2 `MOST_LINES`.

  Returns:
    (records, in the order of the file within a stage, messages about lines that were left out).
  """
  samples: dict[tuple[bytes, bytes], _Sample] = {}
  others: list[bytes] = []
  is_last_other = False
  with file.open("rb") as stream:
    for line in stream:
      match = _START.match(line)
      is_last_other = match is None
      if match:
        stage = match[1], match[3]
        if stage not in samples:
          samples[stage] = _Sample()
        samples[stage].add(line)
      elif not line.isspace() and len(others) <= MOST_LINES:
        others.append(line)
  found = [line for sample in samples.values() for line in sample.all()] + others
  parsed = [parse(line) for line in found]
  records = [record for record in parsed if record is not None]
  # The last line may be incomplete if the run is in progress.
  is_last_torn = is_last_other and bool(others) and parsed[-1] is None
  num_bad = len(parsed) - len(records) - is_last_torn
  notes = [f"{num_bad} unreadable lines of {file.name} were skipped"] if num_bad else []
  long = [
    f"{name.decode()} {sample.count:,}" for (name, _), sample in samples.items() if len(sample.lines) < sample.count
  ]
  if long:
    notes.append(f"curves are drawn from a sample of the lines of {file.name}; lines per stage: {', '.join(long)}")
  return records, notes


def tail(file: Path, size: int = 2**16) -> list[dict]:
  """Parses the lines within the last `size` bytes of a file, in order; a long file is not read."""
  with file.open("rb") as stream:
    start = max(0, stream.seek(0, os.SEEK_END) - size)
    stream.seek(start)
    lines = stream.read().split(b"\n")
  # The first piece may be the end of a line, the last one a line that is being written.
  return [record for record in map(parse, lines[bool(start) :]) if record is not None]


def rewind(file: Path, stage: str, round_number: int, step: int) -> dict[str, float]:
  """Deletes the lines of a stage after `step` (all of its lines for step 0) and lines that cannot be read.

  The file has either its old or its new content, even after a crash.

  Returns:
    `seconds` and `useful_seconds` of the last remaining line that has them; 0 if there is none.
  """
  totals = ("seconds", "useful_seconds")
  if not file.exists():
    return dict.fromkeys(totals, 0.0)

  def is_kept(head: Header | None) -> bool:
    return head is not None and not (head[:2] == (stage, round_number) and (step == 0 or head[2] > step))

  position, end, is_suffix, is_ended, last = 0, 0, True, True, b""
  with file.open("rb") as stream:
    for line in stream:
      position += len(line)
      if is_kept(header(line)):
        # What is dropped is at the end of the file, unless a line that is kept follows it.
        is_suffix = is_suffix and end == position - len(line)
        end, is_ended = position, line.endswith(b"\n")
        last = line if b'"seconds": ' in line else last
  if is_suffix:
    if end < position:
      os.truncate(file, end)
  else:
    temporary = file.with_suffix(".tmp")
    with file.open("rb") as stream, temporary.open("wb") as out:
      for line in stream:
        if is_kept(header(line)):
          out.write(line if line.endswith(b"\n") else line + b"\n")
      out.flush()
      os.fsync(out.fileno())
    temporary.replace(file)
  if is_suffix and not is_ended:
    with file.open("ab") as out:
      out.write(b"\n")
  record = parse(last) or {}
  return {name: float(record[name]) if isinstance(record.get(name), int | float) else 0.0 for name in totals}

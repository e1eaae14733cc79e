"""Scaling curves from benchmark results: cost over the size along one axis, and exponents of fitted power laws."""

from collections.abc import Iterator, Sequence
import math
import statistics

KINDS = {
  "time": lambda row: row["seconds"],
  "temporaries": lambda row: row["facts"].get("temporaries_mb"),
  "arguments": lambda row: row["facts"].get("resident_mb"),
  "compile time": lambda row: row["seconds_compile"],
}


def curves(rows: Sequence[dict]) -> dict[str, dict[str, list[dict]]]:
  """axis -> series -> measured rows, sorted by x."""
  found: dict[str, dict[str, list[dict]]] = {}
  for row in rows:
    facts = row.get("facts", {})
    if "axis" in facts and "error" not in row:
      found.setdefault(facts["axis"], {}).setdefault(facts.get("series", ""), []).append(row)
  for of_series in found.values():
    for points in of_series.values():
      points.sort(key=lambda row: row["facts"]["x"])
  return found


def exponent(points: Sequence[dict], kind: str) -> float | None:
  """Exponent e of y ~ x ** e, by least squares in log space; None with fewer than two measured points."""
  pairs = [(row["facts"]["x"], KINDS[kind](row)) for row in points]
  pairs = [(math.log(x), math.log(max(y, 1e-6))) for x, y in pairs if y is not None]
  if len({x for x, _ in pairs}) < 2:
    return None
  return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def lines(rows: Sequence[dict]) -> Iterator[str]:
  """Markdown lines: one table per axis, with a row per size, a column group per series, and exponents last."""
  for axis, of_series in curves(rows).items():
    kinds = [kind for kind, value in KINDS.items() if any(value(p[0]) is not None for p in of_series.values())]
    names = [f"{kind}, {'s' if 'time' in kind else 'MB'}" for kind in kinds]
    yield ""
    yield _line(axis, [f"{series} {name}".strip() for series in of_series for name in names])
    yield _line("---", ["---"] * (len(of_series) * len(kinds)))
    for x in sorted({row["facts"]["x"] for points in of_series.values() for row in points}):
      cells = []
      for points in of_series.values():
        row = next((row for row in points if row["facts"]["x"] == x), None)
        cells += [_cell(KINDS[kind](row), kind) if row else "" for kind in kinds]
      yield _line(f"{x:g}", cells)
    slopes = [exponent(points, kind) for points in of_series.values() for kind in kinds]
    yield _line("exponent", ["" if slope is None else f"{slope:.2f}" for slope in slopes])


def _cell(value: float | None, kind: str) -> str:
  if value is None:
    return ""
  return f"{value:.3g}" if "time" in kind else f"{value:.1f}"


def _line(name: str, cells: Sequence[str]) -> str:
  return f"| {name} | " + " | ".join(cells) + " |"

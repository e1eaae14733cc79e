"""Formats results as a Markdown table."""

from collections.abc import Iterator, Sequence

from benchmarks import growth, learning_table
from benchmarks.sizes import MKL_NATIVE

OURS = "uae_jax"
HEADER = (
  "suite",
  "case",
  "backend",
  "seconds",
  "range",
  "processor s",
  "rate",
  "ratio",
  "roof",
  "peak MB",
  "compile s",
)
NATIVE_RATIO = "ratio, MKL native"
# Cases of the roof suite that define a roof. Attention is measured against the roof of the matrix product.
ROOFS = {"matrix product": "flops", "matrix reading": "bytes", "memory copy": "bytes"}


def roofs(rows: Sequence[dict]) -> dict[str, float]:
  """The best rates of any backend in the roof suite: "flops" and "bytes" per second, 0 if it did not run."""
  best = {"flops": 0.0, "bytes": 0.0}
  for row in rows:
    if row["suite"] == "roof" and "seconds" in row and row["case"] in ROOFS:
      kind = ROOFS[row["case"]]
      best[kind] = max(best[kind], row[kind] / row["fastest"])
  return best


def seconds_at_roof(row: dict, best: dict[str, float]) -> float | None:
  """Seconds of a case at the roof that bounds it; None if its work was not counted."""
  parts = [row[kind] / best[kind] for kind in best if row.get(kind) and best[kind]]
  return max(parts, default=None)


def ratio(row: dict, rows: Sequence[dict], field: str = "seconds", *, is_native: bool = False) -> float | None:
  """Time of the fastest peer divided by ours; None for rows of peers and without a peer.

  `is_native` compares with the peers whose MKL uses its best kernels, instead of those with MKL as it is.
  """
  if row["backend"] != OURS or "seconds" not in row:
    return None
  peers = [
    other[field]
    for other in rows
    if (other["suite"], other["case"]) == (row["suite"], row["case"])
    and other["backend"] != OURS
    and field in other
    and other["backend"].endswith(MKL_NATIVE) == is_native
  ]
  return min(peers) / row[field] if peers else None


def disagreement(row: dict, rows: Sequence[dict]) -> float | None:
  """Largest difference of a peer's check values from ours, relative to our largest; None if either is missing."""
  ours = next(
    (
      other
      for other in rows
      if (other["suite"], other["case"], other["backend"]) == (row["suite"], row["case"], OURS) and other.get("check")
    ),
    None,
  )
  if row["backend"] == OURS or not row.get("check") or ours is None:
    return None
  largest = max(map(abs, ours["check"])) or 1.0
  return max(abs(a - b) for a, b in zip(row["check"], ours["check"], strict=True)) / largest


def about(row: dict) -> str:
  """Device, versions and flags of a row's process."""
  return "; ".join(f"{name} {value}" for name, value in row["about"].items() if value)


def number(value: float | None, suffix: str = "") -> str:
  """Formats three significant digits."""
  return "" if value is None else f"{value:.3g}{suffix}"


def table(rows: Sequence[dict]) -> str:
  """Markdown with one row per case and backend, then failed cases and the agreement of check values."""
  best = roofs(rows)
  return "\n".join(_lines(rows, best)) + "\n"


def _lines(rows: Sequence[dict], best: dict[str, float]) -> Iterator[str]:
  has_native = any(row["backend"].endswith(MKL_NATIVE) for row in rows)
  header = (*HEADER, NATIVE_RATIO) if has_native else HEADER
  yield "| " + " | ".join(header) + " |"
  yield "|---" * len(header) + "|"
  for row in rows:
    if "error" in row:
      continue
    at_roof = seconds_at_roof(row, best)
    cells = (
      row["suite"],
      row["case"],
      row["backend"],
      number(row["seconds"]),
      f"{number(row['fastest'])} to {number(row['slowest'])}",
      number(row["processor_seconds"]),
      f"{number(row['rate'])} {row['unit']}/s",
      number(ratio(row, rows), "x"),
      "" if at_roof is None else f"{at_roof / row['seconds']:.0%}",
      f"{row['memory_peak_mb']:.0f}",
      number(row["seconds_compile"]),
      *([number(ratio(row, rows, is_native=True), "x")] if has_native else []),
    )
    yield "| " + " | ".join(cells) + " |"
  yield ""
  yield (
    f"Roof: {best['flops'] / 1e9:.0f} GFLOP/s, {best['bytes'] / 1e9:.1f} GB/s. "
    "Ratio: time of the fastest peer over ours. Roof column: time at the roof that bounds the case over measured time."
  )
  yield from growth.lines(rows)
  yield from learning_table.lines(rows)
  for text in dict.fromkeys(f"{row['backend']}: {about(row)}" for row in rows if row.get("about")):
    yield f"\n{text}"
  for row in rows:
    if "error" in row:
      yield f"\n{row['suite']} {row['case']}, {row['backend']}: {row['error']}"
    elif (difference := disagreement(row, rows)) is not None:
      yield f"\n{row['suite']} {row['case']}, {row['backend']}: numbers differ by {difference:.1e} of the largest"

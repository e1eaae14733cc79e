"""The figure of the mutual-gain experiment as SVG: gain in understanding against gain in following, by starting point.

python -m benchmarks.mutual_gain --show=docs/results/mutual_gain.json --figure=docs/results/mutual_gain.svg
"""

from collections.abc import Mapping
from html import escape
import math

from configs import mutual_gain as grid

SIZE, MARGIN, LEGEND = 460, 60, 250
COLORS = ("#2f6fde", "#e0852b", "#3a9a5b", "#9b59b6")
X, Y = "objects_followed", "forced_choice"
NAMES = {X: "objects right from true captions", Y: "forced choice"}


def points(results: Mapping) -> dict[str, tuple[float, float, float, float]]:
  """Cell -> (gain in following, its standard error, gain in understanding, its standard error), means over seeds."""
  found = {}
  for cell in grid.CELLS:
    gains = [cells[cell]["gains"] for cells in results["cells"].values() if cell in cells and "." in cell]
    gains = [gain for gain in gains if gain]
    if gains:
      found[cell] = tuple(
        value
        for name in (X, Y)
        for value in (
          sum(gain[name]["gain"] for gain in gains) / len(gains),
          math.hypot(*(gain[name]["standard_error"] for gain in gains)) / len(gains),
        )
      )
  return found


def figure(results: Mapping) -> str:
  """Draws a point with bars of one standard error for every treatment that was measured."""
  found = points(results)
  ends = [0.0] + [m + sign * e for x, ex, y, ey in found.values() for m, e in ((x, ex), (y, ey)) for sign in (-1, 1)]
  low, high = min(ends), max(ends)
  room = 0.08 * (high - low or 1.0)
  low, high = low - room, high + room

  def place(value: float) -> float:
    return (value - low) / (high - low) * (SIZE - 2 * MARGIN)

  def at(x: float, y: float) -> tuple[float, float]:
    return MARGIN + place(x), SIZE - MARGIN - place(y)

  (zero_x, zero_y), (left, bottom), (right, top) = at(0, 0), at(low, low), at(high, high)
  parts = [
    f'<path d="M{left:.1f} {zero_y:.1f}H{right:.1f}M{zero_x:.1f} {bottom:.1f}V{top:.1f}" stroke="#bbb"/>',
    f'<text x="{right:.1f}" y="{zero_y - 6:.1f}" text-anchor="end" fill="#777">0</text>',
    f'<text x="{(left + right) / 2:.1f}" y="{SIZE - 18}" text-anchor="middle">gain in {NAMES[X]}</text>',
    f'<text transform="translate(20 {SIZE / 2}) rotate(-90)" text-anchor="middle">gain in {NAMES[Y]}</text>',
  ]
  for value in (low, high):
    x, y = at(value, value)
    parts.append(f'<text x="{x:.1f}" y="{SIZE - MARGIN + 18}" text-anchor="middle">{value:+.2f}</text>')
    parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{value:+.2f}</text>')
  starts = (*grid.DECODERS, grid.RANDOM)
  for i, (cell, (x, ex, y, ey)) in enumerate(found.items()):
    start, _, treatment = cell.partition(".")
    color = COLORS[starts.index(start)]
    (cx, cy), width, height = at(x, y), place(low + ex), place(low + ey)
    bars = f"M{cx - width:.1f} {cy:.1f}h{2 * width:.1f}M{cx:.1f} {cy - height:.1f}v{2 * height:.1f}"
    parts.append(
      f'<path d="{bars}" stroke="{color}"/>'
      f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="9" fill="{color}"/>'
      f'<text x="{cx:.1f}" y="{cy + 4:.1f}" text-anchor="middle" fill="white">{i + 1}</text>'
      f'<text x="{SIZE}" y="{MARGIN + 18 * i}" fill="{color}">{i + 1} {escape(f"{start}: {treatment}")}</text>'
    )
  height = max(SIZE, MARGIN + 18 * len(found) + 20)
  size = f'width="{SIZE + LEGEND}" height="{height}" viewBox="0 0 {SIZE + LEGEND} {height}"'
  style = 'font-family="sans-serif" font-size="12" fill="#333"'
  background = '<rect width="100%" height="100%" fill="white"/>'
  return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'

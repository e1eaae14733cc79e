"""Plots results as one SVG: bars of time relative to ours, one group per case."""

from collections.abc import Sequence
from html import escape

from benchmarks.sizes import MKL_NATIVE
from benchmarks.table import OURS

BAR, GAP, LEFT, WIDTH, RIGHT = 16, 14, 300, 520, 90
COLORS = {"uae_jax": "#2f6fde", "torch": "#e0852b", "torch_compiled": "#9b9b9b"}


def color_of(backend: str) -> str:
  return COLORS[backend.removesuffix(MKL_NATIVE)]


def chart(rows: Sequence[dict]) -> str:
  """Draws all cases that have a peer; ours is 1, and shorter is better."""
  groups: dict[tuple[str, str], list[dict]] = {}
  for row in rows:
    if "seconds" in row and row["suite"] != "roof":
      groups.setdefault((row["suite"], row["case"]), []).append(row)
  groups = {key: group for key, group in groups.items() if len(group) > 1 and group[0]["backend"] == OURS}
  longest = max((row["seconds"] / group[0]["seconds"] for group in groups.values() for row in group), default=1.0)
  parts, y = [], GAP
  for (suite, case), group in groups.items():
    height = BAR * len(group)
    parts.append(
      f'<text x="{LEFT - 8}" y="{y + height / 2 + 4:.0f}" text-anchor="end">{escape(f"{suite}: {case}")}</text>'
    )
    for row in group:
      relative = row["seconds"] / group[0]["seconds"]
      length = WIDTH * relative / longest
      parts.append(
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{color_of(row["backend"])}"/>'
        f'<text x="{LEFT + length + 5:.1f}" y="{y + BAR - 5}">{relative:.2f} ({row["seconds"]:.3g} s)</text>'
      )
      y += BAR
    y += GAP
  for i, (name, color) in enumerate(COLORS.items()):
    parts.append(f'<rect x="{LEFT + 130 * i}" y="{y}" width="10" height="10" fill="{color}"/>')
    parts.append(f'<text x="{LEFT + 130 * i + 15}" y="{y + 9}">{name}</text>')
  size = f'width="{LEFT + WIDTH + RIGHT}" height="{y + 24}"'
  style = 'font-family="sans-serif" font-size="12" fill="#333"'
  background = '<rect width="100%" height="100%" fill="white"/>'
  return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'

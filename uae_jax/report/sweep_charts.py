"""Charts of a sweep as inline SVG: parallel coordinates, and one metric against another."""

from collections.abc import Sequence
import dataclasses
import math

from markupsafe import Markup, escape

from uae_jax.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, label, ticks

AXIS_WIDTH, AXES_HEIGHT, MARGIN = 125, 272, 44
# Ends of the axes; above and below them are their highest and lowest values, and above those the names.
AXIS_TOP, AXIS_BOTTOM = 48, AXES_HEIGHT - 18
# Of a name, which has the width of two axes.
MOST_LETTERS = 32


@dataclasses.dataclass(frozen=True)
class Dot:
  """A run in a chart: `strength` in 0..1 is how good it is, `is_best` marks the best one."""

  name: str
  values: Sequence[float | str | None]
  strength: float
  is_best: bool


def _opacity(dot: Dot) -> str:
  return "1" if dot.is_best else f"{0.25 + 0.6 * dot.strength:.2f}"


def _color(dot: Dot) -> int:
  return 1 if dot.is_best else 0


def _position(values: Sequence[float | str | None]) -> tuple[dict[float | str, float], list[tuple[str, float]], bool]:
  """(value -> place on an axis in 0..1, labels with their places, whether they are numbers).

  Numbers are spaced as such, texts evenly.
  """
  present = [value for value in values if value is not None]
  numbers = [value for value in present if isinstance(value, float)]
  places: dict[float | str, float]
  if len(numbers) < len(present):
    distinct = sorted({str(value) for value in present})
    heights = {text: (i + 0.5) / len(distinct) for i, text in enumerate(distinct)}
    places = {value: heights[str(value)] for value in present}
    return places, list(heights.items()), False
  low, high = min(numbers), max(numbers)
  # A positive field that spans decades was chosen on a logarithmic scale.
  scale = math.log if low > 0 and high / low >= 50 else float
  span = scale(high) - scale(low)
  places = {value: (scale(value) - scale(low)) / span if span else 0.5 for value in numbers}
  return places, [(label(value), places[value]) for value in dict.fromkeys((low, high))], True


def _axis_name(name: str, i: int, num_axes: int) -> str:
  """The name of axis `i`; those of neighbors stand at different heights, and a long one loses its start."""
  x = MARGIN + AXIS_WIDTH * i
  # The outer names would begin or end outside of the chart if they were centered.
  x, anchor = (2, "start") if i == 0 else (x + MARGIN - 2, "end") if i == num_axes - 1 else (x, "middle")
  shown = name if len(name) <= MOST_LETTERS else f"…{name[1 - MOST_LETTERS :]}"
  return (
    f'<text class="tick" x="{x}" y="{11 + 13 * (i % 2)}" text-anchor="{anchor}">{escape(shown)}'
    f"<title>{escape(name)}</title></text>"
  )


def parallel_chart(axes: Sequence[str], dots: Sequence[Dot]) -> Markup:
  """A vertical axis per field and metric, and a line per run across them.

  Args:
    axes: names of the axes.
    dots: the runs, with a value per axis.
  """
  width = 2 * MARGIN + AXIS_WIDTH * (len(axes) - 1)
  xs = [MARGIN + AXIS_WIDTH * i for i in range(len(axes))]
  columns = [_position([dot.values[i] for dot in dots]) for i in range(len(axes))]

  def place_y(place: float) -> float:
    return AXIS_BOTTOM - place * (AXIS_BOTTOM - AXIS_TOP)

  parts = [_axis_name(name, i, len(axes)) for i, name in enumerate(axes)]
  parts += [f'<line class="grid" x1="{x}" x2="{x}" y1="{AXIS_TOP}" y2="{AXIS_BOTTOM}"/>' for x in xs]
  for dot in sorted(dots, key=lambda dot: (dot.is_best, dot.strength)):
    commands, pen = [], "M"
    for i, value in enumerate(dot.values):
      if value is None:
        pen = "M"
        continue
      commands.append(f"{pen}{xs[i]} {place_y(columns[i][0][value]):.1f}")
      pen = "L"
    parts.append(
      f'<path class="curve c{_color(dot)}" style="opacity:{_opacity(dot)}" d="{"".join(commands)}">'
      f"<title>{escape(dot.name)}</title></path>"
    )
  for x, (_, labels, are_numbers) in zip(xs, columns, strict=True):
    for text, place in labels:
      # Lines pass beside the highest and lowest numbers, not through them.
      y = place_y(place) + (4 if not are_numbers else 14 if place == 0 else -6)
      at = f'x="{x}" text-anchor="middle"' if are_numbers else f'x="{x + 6}"'
      parts.append(f'<text class="tick value" {at} y="{y:.1f}">{escape(text)}</text>')
  return Markup(
    # Within these limits its text is as large as that of the page, however many axes there are.
    f'<svg class="parallel" style="min-width:{round(0.9 * width)}px;max-width:{round(1.25 * width)}px" '
    f'viewBox="0 0 {width} {AXES_HEIGHT}" role="img" '
    f'aria-label="parallel coordinates of the runs">{"".join(parts)}</svg>'
  )


def scatter_chart(x_name: str, y_name: str, dots: Sequence[Dot]) -> Markup:
  """One metric against another, a dot per run; runs without both are left out.

  Args:
    x_name: metric of the x axis.
    y_name: metric of the y axis.
    dots: the runs, with the values (x, y).
  """
  known = [(dot, float(dot.values[0]), float(dot.values[1])) for dot in dots if None not in dot.values]  # type: ignore
  if not known:
    return Markup('<p class="empty">no run has both</p>')

  def limits(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.07 * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
    return min(values) - margin, max(values) + margin

  left, right = limits([x for _, x, _ in known])
  low, high = limits([y for _, _, y in known])

  def place_x(x: float) -> float:
    return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

  def place_y(y: float) -> float:
    return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

  parts = []
  for tick in ticks(low, high):
    y = place_y(tick)
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
  for tick in ticks(left, right, 4):
    x = place_x(tick)
    parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{label(tick)}</text>')
  for dot, x, y in sorted(known, key=lambda item: item[0].is_best):
    parts.append(
      f'<circle class="dot c{_color(dot)}" style="opacity:{_opacity(dot)}" cx="{place_x(x):.1f}" '
      f'cy="{place_y(y):.1f}" r="4"><title>{escape(dot.name)}: {label(x)}, {label(y)}</title></circle>'
    )
  return Markup(
    f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_name)} against '
    f'{escape(x_name)}">{"".join(parts)}</svg>'
  )

"""Line charts and stacked bars as inline SVG; the page needs no plotting library and no network."""

from collections.abc import Sequence
import dataclasses
import json
import math

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 14, 24
MAX_POINTS = 240


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve; `color` is an index into the palette of page.css."""

  label: str
  xs: Sequence[float]
  ys: Sequence[float]
  color: int = 0


@dataclasses.dataclass(frozen=True)
class Reference:
  """A dashed horizontal line, such as the true caption length."""

  label: str
  y: float


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """About `count` round numbers within [low, high]."""
  span = high - low
  if not span > 0:
    return [low]
  raw = span / count
  magnitude = 10.0 ** math.floor(math.log10(raw))
  step = min((s for s in (1, 2, 2.5, 5, 10) if s * magnitude >= raw), default=10) * magnitude
  first = math.ceil(low / step - 1e-9)
  return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
  """Formats three significant digits, with an exponent only for very small and very large values."""
  if value == 0 or not math.isfinite(value):
    return "0" if value == 0 else "–"
  if 1e-4 <= abs(value) < 1e6:
    text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
  return f"{value:.1e}"


def smooth(values: Sequence[float], window: int) -> list[float]:
  """Centered running mean over the finite values; NaN where a value is not finite."""
  half, smoothed = window // 2, []
  for i in range(len(values)):
    near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
    smoothed.append(sum(near) / len(near) if near and math.isfinite(values[i]) else math.nan)
  return smoothed


def thin(line: Line) -> Line:
  """Reduces a line to at most MAX_POINTS points by averaging neighbors."""
  size = math.ceil(len(line.xs) / MAX_POINTS)
  if size <= 1:
    return line
  chunks = [slice(start, start + size) for start in range(0, len(line.xs), size)]
  ys = []
  for chunk in chunks:
    finite = [y for y in line.ys[chunk] if math.isfinite(y)]
    ys.append(sum(finite) / len(finite) if finite else math.nan)
  return dataclasses.replace(line, xs=[line.xs[chunk][-1] for chunk in chunks], ys=ys)


def _path(points: Sequence[tuple[float, float]]) -> str:
  """An SVG path with a gap wherever a value is not finite."""
  commands, pen = [], "M"
  for x, y in points:
    if not math.isfinite(y):
      pen = "M"
      continue
    commands.append(f"{pen}{x:.1f} {y:.1f}")
    pen = "L"
  return "".join(commands)


def line_chart(
  lines: Sequence[Line],
  *,
  title: str,
  x_unit: str = "step",
  references: Sequence[Reference] = (),
  y_range: tuple[float, float] | None = None,
) -> Markup:
  """Draws the curves of one card: measured values faint, their running mean strong.

  Args:
    title: label for screen readers.
    x_unit: unit of the x axis, "step" or "minutes".
    references: dashed horizontal lines.
    y_range: minimum range of the y axis, such as (0, 1), extended to include the data; None fits the axis to the data.
  """
  lines = [thin(line) for line in lines]
  finite = [y for line in lines for y in line.ys if math.isfinite(y)]
  finite += [reference.y for reference in references if math.isfinite(reference.y)]
  xs = [x for line in lines for x in line.xs]
  if not finite or not xs:
    return Markup('<p class="empty">nothing logged</p>')
  low, high = min(finite), max(finite)
  if y_range is not None:
    low, high = min(low, y_range[0]), max(high, y_range[1])
  else:
    margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    # The axis of a nonnegative quantity does not extend below 0.
    low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
  left, right = min(xs), max(xs)
  if right == left:
    left, right = left - 0.5, right + 0.5

  def place_x(x):
    return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

  def place_y(y):
    return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM) if math.isfinite(y) else math.nan

  parts = []
  for tick in ticks(low, high):
    y = place_y(tick)
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
  x_ticks = ticks(left, right)
  for tick in x_ticks:
    x = place_x(tick)
    anchor = "end" if x > WIDTH - 36 else "middle"
    unit = (" min" if x_unit == "minutes" else " steps") if tick == x_ticks[-1] else ""
    text = label(tick) + unit
    parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{text}</text>')
  for reference in references:
    if math.isfinite(reference.y):
      y = place_y(reference.y)
      parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
      text = escape(f"{reference.label} {label(reference.y)}")
      parts.append(f'<text class="reference-label" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{text}</text>')
  for line in lines:
    window = max(1, len(line.xs) // 12)
    measured = _path([(place_x(x), place_y(y)) for x, y in zip(line.xs, line.ys, strict=True)])
    if window > 1:
      parts.append(f'<path class="raw c{line.color}" d="{measured}"/>')
      means = smooth(line.ys, window)
      measured = _path([(place_x(x), place_y(y)) for x, y in zip(line.xs, means, strict=True)])
    parts.append(f'<path class="curve c{line.color}" d="{measured}"/>')
    if len(line.xs) == 1:
      parts.append(
        f'<circle class="dot c{line.color}" cx="{place_x(line.xs[0]):.1f}" cy="{place_y(line.ys[0]):.1f}" r="3"/>'
      )
  hover = [
    [round(place_x(x), 1), f"{label(x)} min" if x_unit == "minutes" else f"step {x:,.0f}"]
    + [f"{line.label} {label(line.ys[i])}" for line in lines if i < len(line.ys) and math.isfinite(line.ys[i])]
    for i, x in enumerate(lines[0].xs)
  ]
  return Markup(
    f'<svg class="chart by-{"time" if x_unit == "minutes" else "step"}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{escape(title)}" data-points="{escape(json.dumps(hover))}">{"".join(parts)}'
    f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
  )


@dataclasses.dataclass(frozen=True)
class Part:
  """One segment of a stacked bar."""

  label: str
  value: float
  color: int


def duration(seconds: float) -> str:
  """Formats a duration: 7.3 s, 4 min 05 s, 3 h 20 min."""
  if not math.isfinite(seconds):
    return "–"
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def stacked_bar(parts: Sequence[Part], longest: float) -> Markup:
  """A horizontal bar of phases; its length is its total as a fraction of `longest`."""
  total = sum(part.value for part in parts)
  pieces = "".join(
    f'<span class="piece f{part.color}" style="flex-grow:{part.value:.4g}" '
    f'title="{escape(part.label)}: {duration(part.value)} ({part.value / total:.0%})"></span>'
    for part in parts
    if part.value > 0
  )
  return Markup(f'<div class="bar" style="width:{max(100 * total / longest, 0.5):.2f}%">{pieces}</div>')


def interval(low: float, middle: float, high: float, limit: float) -> Markup:
  """A difference with its interval as a dot on a bar, around a line at 0; the axis runs from -limit to limit."""
  width, height = 160, 18

  def place(value):
    return width / 2 + (value / limit if limit else 0.0) * (width / 2 - 6)

  return Markup(
    f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" '
    f'aria-label="{label(middle)}, from {label(low)} to {label(high)}">'
    f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
    f'<line class="range" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{height / 2}" y2="{height / 2}"/>'
    f'<circle class="mean" cx="{place(middle):.1f}" cy="{height / 2}" r="4"/></svg>'
  )

"""The results of a sweep: a row per run, with what it changes and its metrics."""

from collections.abc import Sequence
import dataclasses
import json
import math
from pathlib import Path
import shlex

from uae_jax import json_files, metrics_file
from uae_jax.report.figures import FIGURES
from uae_jax.report.run import flatten, number
from uae_jax.sweeps.points import Point
from uae_jax.sweeps.runner import Sweep


@dataclasses.dataclass(frozen=True)
class Row:
  """One run.

  Attributes:
    point: what it changes.
    state: "finished", "failed", "started" or "new".
    metrics: held-out metrics after the last stage, and the last logged value of every metric of another name.
    error: last line of a failed run.
  """

  point: Point
  state: str
  metrics: dict[str, float]
  error: str


def read_row(sweep: Sweep, point: Point) -> Row:
  """Reads the results of a run; a run that is not finished has only what it logged."""
  workdir = sweep.workdir(point)
  state = sweep.state(point)
  metrics: dict[str, float] = {}
  file = workdir / metrics_file.METRICS_FILE
  for record in metrics_file.tail(file) if file.exists() else ():
    metrics |= {name: number(value) for name, value in record.items() if math.isfinite(number(value))}
  held_out = workdir / "evaluation" / f"{sweep.experiment(point).runs[-1][0]}.json"
  if state == "finished" and held_out.exists():
    figures = flatten(json_files.read_object(held_out))
    metrics |= {name: number(value) for name, value in figures.items() if math.isfinite(number(value))}
  return Row(point, state, metrics, sweep.error(point) if state == "failed" else "")


def rank(rows: Sequence[Row], metric: str, is_max: bool) -> list[Row]:
  """The rows, the best finished run first; those without the metric come last."""

  def order(row: Row) -> tuple:
    value = row.metrics.get(metric)
    return row.state != "finished", value is None, (-value if is_max else value) if value is not None else 0.0

  return sorted(rows, key=order)


def best(rows: Sequence[Row], metric: str, is_max: bool) -> Row | None:
  """The best finished run; None if no finished run has the metric."""
  ranked = [row for row in rank(rows, metric, is_max) if row.state == "finished" and metric in row.metrics]
  return ranked[0] if ranked else None


def varied(points: Sequence[Point]) -> list[str]:
  """The fields in which the points differ."""
  fields = list(dict.fromkeys(field for point in points for field, _ in point.overrides))
  return [field for field in fields if len({dict(point.overrides).get(field) for point in points}) > 1]


def columns(rows: Sequence[Row], metric: str, more: Sequence[str]) -> list[str]:
  """The metrics of the table: the chosen one, those that the user names, and the main held-out metrics."""
  names = dict.fromkeys([metric, *more, *(figure.key for figure in FIGURES)])
  return [name for name in names if any(name in row.metrics for row in rows)]


def command(sweep: Sweep, point: Point, separator: str = " ") -> str:
  """The command that repeats a run in a workdir of its own; `separator` is before every flag."""
  words = [f"{word}_again" if word == f"--workdir={sweep.workdir(point)}" else word for word in sweep.arguments(point)]
  return separator.join(["uae-jax train", *map(shlex.quote, words)])


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
  """The results as text."""
  cells = [["run", "state", *metrics]]
  for row in rows:
    values = [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in metrics]
    cells.append([row.point.name, row.state, *values])
  widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
  return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def write_json(file: Path, sweep: Sweep, rows: Sequence[Row], metric: str, goal: str) -> None:
  """Writes what was run and what came out."""
  from uae_jax.files import write_whole

  content = {
    "config": sweep.config,
    "flags": list(sweep.common),
    "metric": metric,
    "goal": goal,
    "runs": [
      {
        "name": row.point.name,
        "overrides": dict(row.point.overrides),
        "state": row.state,
        "error": row.error,
        "metrics": row.metrics,
        "command": command(sweep, row.point),
      }
      for row in rows
    ],
  }
  write_whole(file, json.dumps(content, indent=1) + "\n")

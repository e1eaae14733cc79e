"""The page of a sweep: best run, results, parallel coordinates, and metric against metric."""

from collections import Counter
from collections.abc import Sequence
import datetime
import math
from pathlib import Path

from uae_jax.files import write_whole
from uae_jax.report.sweep_charts import Dot, parallel_chart, scatter_chart
from uae_jax.report.templates import environment
from uae_jax.sweeps import results
from uae_jax.sweeps.points import insert
from uae_jax.sweeps.results import Row
from uae_jax.sweeps.runner import Sweep

MOST_AXES, MOST_SCATTERS = 10, 6


def write_page(sweep: Sweep, name: str, rows: Sequence[Row], metric: str, goal: str, metrics: Sequence[str]) -> Path:
  """Writes `index.html` in the sweep's folder; returns its path.

  Args:
    sweep: the sweep.
    name: heading of the page.
    rows: the results, the best first.
    metric: metric by which runs are compared.
    goal: "max" or "min".
    metrics: columns of the table.
  """
  winner = results.best(rows, metric, goal == "max")
  fields = results.varied([row.point for row in rows])
  shown = {
    field: field if ends.count(end) > 1 else end
    for ends in [[f.rpartition(".")[2] for f in fields]]
    for field in fields
    for end in [field.rpartition(".")[2]]
  }
  finished = [row for row in rows if row.state == "finished"]
  dots = [(row, _strength(row, finished, metric, goal == "max"), row is winner) for row in finished]
  axes = [*fields, *metrics][:MOST_AXES]
  lines = [
    Dot(
      row.point.name,
      [*(_number(row.point, field) for field in fields), *map(row.metrics.get, metrics)][:MOST_AXES],
      strength,
      is_best,
    )
    for row, strength, is_best in dots
  ]
  html = (
    environment()
    .get_template("sweep.html")
    .render(
      name=name,
      config=sweep.config,
      counts=", ".join(f"{count} {state}" for state, count in Counter(row.state for row in rows).items()),
      written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
      metric=metric,
      goal=goal,
      known=", ".join(sorted({name for row in finished for name in row.metrics})),
      best=winner
      and {
        "name": winner.point.name,
        "value": f"{winner.metrics[metric]:.4g}",
        "command": results.command(sweep, winner.point, " \\\n  "),
      },
      fields=[shown[field] for field in fields],
      metrics=list(metrics),
      rows=[
        {
          "name": row.point.name,
          "state": row.state,
          "is_best": row is winner,
          "report": f"{row.point.name}/report/index.html" if row.state == "finished" else "",
          "cells": [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in metrics]
          + [_text(row.point, field) for field in fields],
        }
        for row in rows
      ],
      failures=[{"name": row.point.name, "error": row.error} for row in rows if row.error],
      parallel=parallel_chart([shown.get(axis, axis) for axis in axes], lines)
      if len(lines) > 1 and len(axes) > 1
      else "",
      scatters=[
        {
          "title": other,
          "chart": scatter_chart(
            metric,
            other,
            [
              Dot(row.point.name, (row.metrics.get(metric), row.metrics.get(other)), strength, is_best)
              for row, strength, is_best in dots
            ],
          ),
        }
        for other in [name for name in metrics if name != metric][:MOST_SCATTERS]
        if metric in metrics and len(finished) > 1
      ],
    )
  )
  file = sweep.folder / "index.html"
  write_whole(file, html)
  return file


def _strength(row: Row, rows: Sequence[Row], metric: str, is_max: bool) -> float:
  """How good a run is, in 0..1 between the worst and the best of them; 0 without the metric."""
  values = [other.metrics[metric] for other in rows if metric in other.metrics]
  if metric not in row.metrics or max(values) == min(values):
    return 0.0
  share = (row.metrics[metric] - min(values)) / (max(values) - min(values))
  return share if is_max else 1.0 - share


def _text(point, field: str) -> str:
  values = dict(point.overrides)
  return insert(values.get(field, ""), values)


def _number(point, field: str) -> float | str | None:
  """A value as a number if it is one; None if the run does not set the field."""
  text = _text(point, field)
  try:
    return float(text) if math.isfinite(float(text)) else text
  except ValueError:
    return text or None

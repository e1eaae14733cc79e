"""Successive halving: runs go to a fraction of their steps, the best go on.

A run is stopped like a preempted one, so that it goes on later bit for bit, with the schedules of the whole run.
"""

from collections.abc import Callable, Sequence
import math

from uae_jax import metrics_file
from uae_jax.sweeps.points import Point
from uae_jax.sweeps.runner import Sweep, run_all


def value_at(sweep: Sweep, point: Point, metric: str, fraction: float) -> float | None:
  """The logged metric at the first step from `fraction` of the last stage on; None if it was not reached."""
  config = sweep.experiment(point)
  folder, stage = config.runs[-1]
  round_number = int(folder.rpartition("_round")[2]) if folder != stage else 0
  target = fraction * config.section(stage).total_steps
  file = sweep.workdir(point) / metrics_file.METRICS_FILE
  name, last = f'"{metric}": '.encode(), None
  is_finished = sweep.state(point) == "finished"
  # Most calls are for runs on their way: only the end of a long file is read then.
  if not file.exists() or not (is_finished or any(r["step"] >= target for r in metrics_file.tail(file))):
    return None
  with file.open("rb") as stream:
    for line in stream:
      record = metrics_file.parse(line) if name in line else None
      if record and (record["stage"], record["round"]) == (stage, round_number) and record[metric] is not None:
        last = float(record[metric])
        if record["step"] >= target:
          return last
  # A stage with a target loss may end early.
  return last if is_finished else None


def halve(
  sweep: Sweep,
  fractions: Sequence[float],
  keep: float,
  metric: str,
  is_max: bool,
  *,
  parallel: int,
  retry_failed: bool,
  log: Callable[[str], None] = print,
) -> list[Point]:
  """Runs all points to each fraction in turn; returns those that go on to the end.

  Args:
    sweep: the sweep.
    fractions: of the steps of the last stage, increasing.
    keep: share of the runs that goes on after each fraction; at least one does.
    metric: a metric that is logged in the last stage.
    is_max: whether more is better.
    parallel: number of processes at a time.
    retry_failed: whether to run those again that have failed.
    log: receives a line per event.

  Raises:
    ValueError: no run logged the metric.
    KeyboardInterrupt: the sweep was interrupted.
  """
  alive = list(sweep.points)
  for fraction in fractions:
    run_all(
      sweep,
      alive,
      parallel=parallel,
      retry_failed=retry_failed,
      is_enough=lambda point: value_at(sweep, point, metric, fraction) is not None,  # noqa: B023
      log=log,
    )
    values = {}
    for point in alive:
      value = value_at(sweep, point, metric, fraction)
      if value is not None and math.isfinite(value):
        values[point.name] = value
    ranked = [point for point in alive if point.name in values]
    if not ranked:
      raise ValueError(f"--halving: no run logged {metric!r} at {fraction:.0%} of its last stage")
    ranked.sort(key=lambda point: values[point.name], reverse=is_max)
    num_alive = len(alive)
    alive = ranked[: max(1, math.ceil(keep * len(alive)))]
    log(f"at {fraction:.0%}: {', '.join(point.name for point in alive)} of {num_alive} go on")
  return alive

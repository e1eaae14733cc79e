"""The report of a run: collects everything that `page.html` shows and writes one self-contained file."""

import datetime
from pathlib import Path
from typing import Any

from uae_jax.files import write_whole
from uae_jax.report import captions_of_data, curves, figures, samples
from uae_jax.report.findings import findings
from uae_jax.report.run import REINFORCEMENT, Run, flatten, read_run
from uae_jax.report.templates import environment


def config_groups(run: Run) -> list[dict]:
  """The config, grouped by top-level section."""
  groups, single = [], []
  for name, value in run.config.items():
    if isinstance(value, dict) and value:
      groups.append({"name": name, "rows": [(key, _value(v)) for key, v in flatten(value).items()]})
    else:
      single.append((name, _value(value)))
  changes = [
    (f"{field}, from step {change['step']:,} of {change['stage']}", f"{_value(before)} → {_value(after)}")
    for change in run.changes
    for field, (before, after) in change["changes"].items()
  ]
  groups = ([{"name": "run", "rows": single}] if single else []) + groups
  return ([{"name": "changed when the run was resumed", "rows": changes}] if changes else []) + groups


def _value(value: Any) -> str:
  return value if isinstance(value, str) else repr(value)


def status(run: Run) -> str:
  """Progress of the run in one line."""
  planned = run.config.get("stages")
  done = {stage.name for stage in run.evaluations}
  if isinstance(planned, (list, tuple)) and planned and done.issuperset(map(str, planned)):
    return "finished"
  active = [stage for stage in run.stages if stage in run.metrics]
  if not active:
    return "not started" if not run.stages else "evaluated"
  last = active[-1]
  step = run.metrics[last][-1]["step"]
  return f"{'after' if last in run.evaluations else 'in'} {last.title}, step {step:,}"


def write_report(workdir: str | Path) -> Path:
  """Writes `report/index.html` for a finished or unfinished run; returns its path.

  Raises:
    FileNotFoundError: the folder does not exist.
    ValueError: the folder is not the workdir of a run.
  """
  run = read_run(workdir)
  html = (
    environment()
    .get_template("page.html")
    .render(
      name=run.workdir.resolve().name,
      path=str(run.workdir),
      written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
      status=status(run),
      notes=run.notes,
      findings=findings(run),
      has_checks=any(stage.name in REINFORCEMENT for stage in run.stages),
      tiles=figures.tiles(run),
      headline=figures.headline(run),
      curves=curves.curves(run),
      times=curves.times(run),
      gallery=samples.gallery(run),
      captions=samples.captions_over_time(run),
      figures=figures.all_figures(run),
      caption_lengths={"columns": captions_of_data.COLUMNS, "rows": captions_of_data.rows(run)},
      config=config_groups(run),
    )
  )
  file = run.workdir / "report" / "index.html"
  file.parent.mkdir(exist_ok=True)
  write_whole(file, html)
  return file

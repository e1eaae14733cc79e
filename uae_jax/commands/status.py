"""`uae-jax status`: how far runs are, how fast, and how much of their time was useful."""

import argparse
import json
from pathlib import Path
import sys

from uae_jax.commands.command_line import Parser, path

COLUMNS = ("run", "state", "stage", "step", "steps/s", "stage ends in", "idle", "saved", "restarts", "goodput")


def parser() -> Parser:
  parser = Parser(
    "status",
    "Prints a line per run: stage, step, rate, time to the end of the stage, time since it last wrote a file, newest "
    "checkpoint, restarts, and goodput (useful seconds per wall second). Reads only the ends of long files.",
  )
  parser.add_argument(
    "workdirs", nargs="+", type=path, metavar="WORKDIR", help="workdir of a run, or a folder of workdirs"
  )
  parser.add_argument("--json", action="store_true", help="print a JSON list instead")
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)

  from uae_jax.report.progress import read_progress

  runs, num_unreadable = [], 0
  for workdir in [workdir for name in arguments.workdirs for workdir in expand(name)]:
    try:
      runs.append(read_progress(workdir))
    except ValueError as error:  # the other runs are shown all the same
      num_unreadable += 1
      print(f"uae-jax status: error: {error}", file=sys.stderr)
  if arguments.json:
    import dataclasses

    print(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
  else:
    rows = [row(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for cells in (COLUMNS, *rows):
      print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
  return 1 if num_unreadable else 0


def expand(folder: Path) -> list[Path]:
  """The folder itself if it is a workdir, else the workdirs in it.

  Raises:
    ValueError: there is none.
  """
  if (folder / "config.json").exists():
    return [folder]
  found = sorted(file.parent for file in folder.glob("*/config.json"))
  if not found:
    raise argparse.ArgumentError(None, f"{folder}: neither the workdir of a run nor a folder of workdirs")
  return found


def row(run) -> tuple[str, ...]:
  """The cells of a run, in the order of COLUMNS; run: `report.progress.Progress`."""
  from uae_jax.report.charts import duration

  def shown(value, text: str) -> str:
    return "" if value is None else text

  return (
    run.workdir,
    run.state,
    run.stage or "",
    shown(run.step, f"{run.step}/{run.total_steps}"),
    "" if run.steps_per_second is None else f"{run.steps_per_second:.3g}",
    "" if run.eta_seconds is None else duration(run.eta_seconds),
    "" if run.idle_seconds is None else duration(run.idle_seconds),
    shown(run.last_save, str(run.last_save)),
    shown(run.restarts, str(run.restarts)),
    "" if run.goodput is None else f"{run.goodput:.0%}",
  )

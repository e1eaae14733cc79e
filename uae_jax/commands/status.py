"""`uae-jax status`: how far runs are, how fast, and how much of their time was useful."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
import sys
from typing import TYPE_CHECKING

from uae_jax import cloud_storage
from uae_jax.commands.command_line import Parser, path
from uae_jax.files import is_in_cloud

if TYPE_CHECKING:
  from uae_jax.report.progress import Progress

COLUMNS = ("run", "state", "stage", "step", "steps/s", "stage ends in", "idle", "saved", "restarts", "goodput")


def parser() -> Parser:
  parser = Parser(
    "status",
    "Prints a line per run: stage, step, rate, time to the end of the stage, time since it last wrote a file, newest "
    "checkpoint, restarts, and goodput (useful seconds per wall second). Reads only the ends of long files.",
  )
  parser.add_argument(
    "workdirs",
    nargs="+",
    type=folder_or_address,
    metavar="WORKDIR",
    help="workdir of a run, or a folder of workdirs, here or in a bucket (gs://BUCKET/NAME)",
  )
  parser.add_argument("--json", action="store_true", help="print a JSON list instead")
  return parser


def folder_or_address(text: str) -> str:
  """The type of a path of this machine, or of an address gs://BUCKET/NAME."""
  return text.rstrip("/") if is_in_cloud(text) else str(path(text))


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  runs: list[Progress] = []
  errors: list[str] = []
  for place in arguments.workdirs:
    read(place, runs, errors)
  for error in errors:
    print(f"uae-jax status: error: {error}", file=sys.stderr)
  if arguments.json:
    print(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
  else:
    rows = [row(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for cells in (COLUMNS, *rows) if rows else ():
      print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
  return 1 if errors else 0


def read(place: str, runs: list["Progress"], errors: list[str]) -> None:
  """Adds the progress of all runs of a folder or address to `runs`, and what could not be read to `errors`."""
  from uae_jax.report.progress import FILES_READ, read_progress

  try:
    with (
      cloud_storage.outline(place, FILES_READ) if is_in_cloud(place) else contextlib.nullcontext(Path(place))
    ) as folder:
      for workdir in expand(folder, place):
        try:
          run = read_progress(workdir)
          runs.append(dataclasses.replace(run, workdir=run.workdir.replace(str(folder), place, 1)))
        except ValueError as error:  # the other runs are shown all the same
          errors.append(str(error).replace(str(folder), place))
  except (ValueError, FileNotFoundError) as error:  # of the bucket
    errors.append(str(error))


def expand(folder: Path, place: str) -> list[Path]:
  """The folder itself if it is a workdir, else the workdirs in it; place: its name in messages.

  Raises:
    ValueError: there is none.
  """
  if (folder / "config.json").exists():
    return [folder]
  found = sorted(file.parent for file in folder.glob("*/config.json"))
  if not found:
    raise argparse.ArgumentError(None, f"{place}: neither the workdir of a run nor a folder of workdirs")
  return found


def row(run: "Progress") -> tuple[str, ...]:
  """The cells of a run, in the order of COLUMNS."""
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

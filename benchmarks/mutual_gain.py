"""The experiment of configs/mutual_gain.py: trains the cells of the grid, measures them and writes one results file.

python -m benchmarks.mutual_gain --out=runs/mutual_gain --seeds=0,1,2 --results=docs/results/mutual_gain.json
python -m benchmarks.mutual_gain --out=runs/mutual_gain --minutes=60 --cells='third*'   a part of it, for an hour
python -m benchmarks.mutual_gain --show=docs/results/mutual_gain.json                   the tables

Every cell is an ordinary run of `uae-jax train`, in OUT/seed-SEED/CELL. The command continues where it stopped: runs
resume, and a measured cell is not measured again. Cells that have not been measured are absent from the results. A
results file that exists keeps its other cells, so that seeds of several machines come together. Flags such as
--config.captioner.total_steps=100 are passed on to every run.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import fnmatch
import hashlib
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from benchmarks import mutual_gain_figure, understanding
from configs import mutual_gain as grid
from uae_jax.evaluation.reconstruction import paired_gain
from uae_jax.files import write_whole
from uae_jax.options import new_config
from uae_jax.report.progress import is_finished
from uae_jax.training import restore

FILE = "mutual_gain.json"
COLUMNS = ("forced_choice", "half_recall", "half_precision", "objects_followed", "caption_recall", "caption_precision")


def needed(cells: Sequence[str]) -> list[str]:
  """These cells and the ones they start from, in the order of the grid."""
  wanted = set(cells)
  for cell in cells:
    while (start := grid.start_of(cell)) is not None:
      cell = start[0]
      wanted.add(cell)
  return [cell for cell in grid.CELLS if cell in wanted]


def command(out: Path, seed: int, cell: str, flags: Sequence[str]) -> list[str]:
  """The command that trains a cell, or continues it."""
  workdir = out / f"seed-{seed}"
  words = [sys.executable, "-m", "uae_jax.cli", "train", f"--config=configs/mutual_gain.py:{cell}"]
  words += [f"--workdir={workdir / cell}", f"--config.seed={seed}", *flags]
  start = grid.start_of(cell)
  return words if start is None else [*words, f"--config.init.checkpoint={workdir / start[0]}:{start[1]}"]


def train(words: Sequence[str], workdir: Path, seconds: float | None) -> bool:
  """Runs a training command to its end; False if it was stopped, after so many seconds or by a signal."""
  process = subprocess.Popen(words)
  try:
    code = process.wait(seconds)
  except subprocess.TimeoutExpired:
    process.terminate()  # it saves a checkpoint and ends
    process.wait()
    return False
  if code:
    raise SystemExit(f"{words[4]} ended with status {code}; its messages are above")
  # A run that a signal stops also ends with status 0.
  return is_finished(workdir, restore.run_config(workdir))


def measure(workdir: Path, num_images: int) -> dict:
  """The figures of the last stage of a run, and the rows of `understanding.PAIRED` for paired differences."""
  folder, _ = restore.run_config(workdir).runs[-1]
  ((_, figures, rows),) = understanding.measure_stages(workdir, [folder], num_images)
  rounded = {name: np.round(row, 5).tolist() for name, row in rows.items()}
  return {"images": num_images, "figures": figures, "rows": rounded, "seconds": _seconds(workdir)}


def _seconds(workdir: Path) -> float:
  """Seconds of training, over all restarts."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return max(json.loads(line).get("seconds", 0.0) for line in lines)


def recipe(flags: Sequence[str]) -> str:
  """Identifies what the configs of all cells set, and the flags: results of other recipes do not belong in one file."""
  defaults = {repr(item) for item in _fields(new_config())}
  cells = [[item for item in _fields(grid.get_config(cell)) if repr(item) not in defaults] for cell in grid.CELLS]
  return hashlib.sha256(repr([cells, sorted(flags)]).encode()).hexdigest()[:16]


def _fields(section: ConfigDict, path: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of all fields of a config."""
  for name in sorted(section):
    value = section[name]
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{path}{name}.")
    else:
      yield f"{path}{name}", value


def merged(results: Mapping, file: Path) -> dict:
  """The results with the cells of a file of the same recipe that they lack.

  Raises:
    ValueError: the file has another recipe.
  """
  if not file.exists():
    return dict(results)
  before = json.loads(file.read_text())
  if before["recipe"] != results["recipe"]:
    raise ValueError(f"{file} has results of another recipe: name another file with --results, or remove it")
  found = dict(before["cells"])
  for seed, cells in results["cells"].items():
    found[seed] = found.get(seed, {}) | cells
  ordered = sorted(found, key=int)
  return {**results, "seeds": [int(seed) for seed in ordered], "cells": {seed: found[seed] for seed in ordered}}


def collect(out: Path, seeds: Sequence[int]) -> dict:
  """All measured cells: seeds, and seed -> cell -> figures, paired gains over the cell's start, seconds."""
  found: dict[int, dict] = {}
  for seed in seeds:
    files = {cell: out / f"seed-{seed}" / cell / FILE for cell in grid.CELLS}
    cells = {cell: json.loads(file.read_text()) for cell, file in files.items() if file.exists()}
    rows = {cell: {k: np.array(v) for k, v in measured["rows"].items()} for cell, measured in cells.items()}
    for cell, measured in cells.items():
      start = grid.start_of(cell)
      before = rows.get(start[0]) if start else None
      gains = {name: paired_gain(before[name], rows[cell][name]) for name in rows[cell]} if before else {}
      found.setdefault(seed, {})[cell] = {
        "figures": measured["figures"],
        "gains": gains,
        "images": measured["images"],
        "seconds": measured["seconds"],
      }
  return {"seeds": list(found), "cells": {str(seed): cells for seed, cells in found.items()}}


def table(results: Mapping) -> str:
  """The results as Markdown: the figures of every cell, then its paired gains over its starting point."""
  lines = ["| cell | seed | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
  gains = ["| gain of | seed | " + " | ".join(understanding.PAIRED.values()) + " |", "|---|---|---|---|---|---|"]
  for cell in grid.CELLS:
    for seed, cells in results["cells"].items():
      if cell in cells:
        figures, gained = cells[cell]["figures"], cells[cell]["gains"]
        lines.append(f"| {cell} | {seed} | " + " | ".join(f"{figures[name]:.3f}" for name in COLUMNS) + " |")
        if gained:
          text = [f"{gained[k]['gain']:+.3f} ± {gained[k]['standard_error']:.3f}" for k in understanding.PAIRED]
          gains.append(f"| {cell} | {seed} | " + " | ".join(text) + " |")
  return "\n".join([*lines, "", *gains])


def run(out: Path, seeds: Sequence[int], cells: Sequence[str], num_images: int, minutes: float, flags) -> None:
  """Trains and measures the cells of every seed that are not measured yet, until the minutes are over."""
  end = time.monotonic() + 60 * minutes if minutes else None
  for seed in seeds:
    for cell in needed(cells):
      workdir = out / f"seed-{seed}" / cell
      if (workdir / FILE).exists():
        continue
      seconds = None if end is None else end - time.monotonic()
      if seconds is not None and seconds <= 0:
        return
      print(f"seed {seed}, {cell}", flush=True)
      if not train(command(out, seed, cell, flags), workdir, seconds):
        return
      write_whole(workdir / FILE, json.dumps(measure(workdir, num_images)) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--out", type=Path, help="folder of the runs")
  parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas; default %(default)s")
  parser.add_argument("--cells", default="*", help="pattern of the cells; those they start from are added")
  parser.add_argument("--images", type=int, default=768, help="held-out scenes; default %(default)s")
  parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many minutes; 0 sets no limit")
  parser.add_argument("--results", type=Path, help="results file; default OUT/mutual_gain.json")
  parser.add_argument("--show", type=Path, help="print the tables of a results file and run nothing")
  parser.add_argument("--figure", type=Path, help="with --show, write the figure to this SVG file as well")
  arguments, flags = parser.parse_known_args(argv)
  if unknown := [flag for flag in flags if not flag.startswith("--config.")]:
    parser.error(f"unknown: {' '.join(unknown)}")
  if arguments.show:
    shown = json.loads(arguments.show.read_text())
    print(table(shown))
    if arguments.figure:
      write_whole(arguments.figure, mutual_gain_figure.figure(shown))
    return 0
  if arguments.figure:
    parser.error("--figure needs --show FILE")
  cells = fnmatch.filter(grid.CELLS, arguments.cells)
  if not arguments.out or not cells:
    parser.error("name --out DIR, or --show FILE" if cells else f"--cells={arguments.cells}: no such cell")
  seeds = [int(seed) for seed in arguments.seeds.split(",")]
  file = arguments.results or arguments.out / FILE
  try:
    merged({"recipe": recipe(flags), "cells": {}}, file)
  except ValueError as error:
    parser.error(str(error))
  run(arguments.out, seeds, cells, arguments.images, arguments.minutes, flags)
  results = merged({"recipe": recipe(flags), **collect(arguments.out, seeds)}, file)
  file.parent.mkdir(parents=True, exist_ok=True)
  write_whole(file, json.dumps(results, indent=1) + "\n")
  print(table(results))
  return 0


if __name__ == "__main__":
  sys.exit(main())

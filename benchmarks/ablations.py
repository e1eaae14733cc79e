"""Rows of docs/ablations.md: the RL stages of `configs/scenes_ablations.py` from base runs that are already trained.

for seed in 0 1 2; do uae-jax train --config=configs/scenes.py --workdir=runs/seed$seed --config.seed=$seed; done
python -m benchmarks.ablations --rows default gspo --seeds 0 1 2 --base runs --out runs/ablations

Each row and seed is one process with its own workdir, OUT/<row>/seed<k>; finished ones are not run again. Further flags
(--config.FIELD=VALUE) apply to every run. Writes OUT/ablations.json and OUT/ablations.md about all runs found in OUT.
"""

import argparse
import json
import math
from pathlib import Path
import resource
import runpy
import subprocess
import sys

CONFIG = Path(__file__).parents[1] / "configs" / "scenes_ablations.py"
COST = "cost.json"
COLUMNS = {
  "caption_recall": "recall",
  "caption_precision": "precision",
  "caption_length": "length",
  "reward_similarity": "reward",
  "held_out_similarity": "held out",
  "object_accuracy": "objects right",
  "psnr": "PSNR",
  "cpu_minutes": "CPU minutes",
}
DIFFERENCES = (
  "caption_recall",
  "caption_precision",
  "reward_similarity",
  "held_out_similarity",
  "object_accuracy",
  "psnr",
)
BASELINES = {"generation_for_understanding": "default", "understanding_for_generation": "flow"}
GAINS = {"reward_similarity": "reward gain", "held_out_similarity": "held-out gain", "psnr": "PSNR gain, dB"}


def run(row: str, start: str, seed: int, base: Path, workdir: Path, flags: list[str]) -> None:
  """Trains one row with one seed, unless it is finished.

  Raises:
    SystemExit: training failed.
  """
  if (workdir / COST).exists():
    return
  command = [sys.executable, "-m", "uae_jax.cli", "train", f"--config={CONFIG}:{row}", f"--workdir={workdir}"]
  command += [f"--config.seed={seed}", f"--config.init.checkpoint={base / f'seed{seed}'}:{start}", *flags]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  if subprocess.run(command, check=False).returncode:
    raise SystemExit(f"{row}, seed {seed} failed: {' '.join(command)}")
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  (workdir / COST).write_text(json.dumps({"cpu_minutes": cpu_seconds / 60}) + "\n")


def figures(workdir: Path, stages: tuple[str, ...]) -> dict:
  """Held-out metrics after the last stage of the last round, and the cost of the run."""
  files = sorted((workdir / "evaluation").glob(f"{stages[-1]}*.json"))
  return json.loads(files[-1].read_text()) | json.loads((workdir / COST).read_text())


def cell(values: list[float], sign: str = "") -> str:
  """Formats mean and range over seeds; `sign` "+" always shows signs."""
  values = [value for value in values if math.isfinite(value)]
  if not values:
    return ""
  digits = 1 if max(map(abs, values)) > 5 else 4 if max(map(abs, values)) < 0.1 else 3
  mean, low, high = (f"{x:{sign}.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
  return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def differences(results: dict[str, dict[int, dict]], rows: dict) -> list[str]:
  """Differences of each row from the default row, paired by seed because seeds differ by more than rows do."""
  names = [COLUMNS[name] for name in DIFFERENCES]
  lines = ["| row | less | seeds | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
  for row, of_seeds in results.items():
    baseline = BASELINES[rows[row]["stages"][-1]]
    seeds = sorted(of_seeds.keys() & results.get(baseline, {}).keys())
    if row == baseline or not seeds:
      continue
    pairs = [(of_seeds[seed], results[baseline][seed]) for seed in seeds]
    cells = [cell([own[name] - other[name] for own, other in pairs], sign="+") for name in DIFFERENCES]
    lines.append(f"| {row} | {baseline} | {' '.join(map(str, seeds))} | " + " | ".join(cells) + " |")
  return lines if len(lines) > 2 else []


def table(results: dict[str, dict[int, dict]], rows: dict) -> str:
  """Markdown of all rows: metrics, differences, and the gain of stage 3 on the same captions."""
  lines = ["| row | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
  gains = ["| row | seeds | " + " | ".join(GAINS.values()) + " |", "|---" * (2 + len(GAINS)) + "|"]
  for row in rows:
    of_seeds = results.get(row, {})
    if not of_seeds:
      continue
    seeds = " ".join(map(str, sorted(of_seeds)))
    cells = [cell([found.get(name, math.nan) for found in of_seeds.values()]) for name in COLUMNS]
    lines.append(f"| {row} | {seeds} | " + " | ".join(cells) + " |")
    paired = [found["paired"] for found in of_seeds.values() if "paired" in found]
    if paired:
      cells = [
        cell([found[name]["gain"] for found in paired])
        + (f" ± {paired[0][name]['standard_error']:.4f}" if len(paired) == 1 else "")
        for name in GAINS
      ]
      gains.append(f"| {row} | {seeds} | " + " | ".join(cells) + " |")
  text = "\n".join(lines) + "\n"
  against = differences(results, rows)
  if against:
    text += "\nThe same seed by seed, less the row that changes nothing:\n\n" + "\n".join(against) + "\n"
  if len(gains) > 2:
    text += "\nAfter stage 3 against before it, from the same captions:\n\n" + "\n".join(gains) + "\n"
  return text


def main() -> None:
  rows = runpy.run_path(str(CONFIG))["ROWS"]
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", nargs="*", default=[], choices=list(rows), metavar="ROW", help=", ".join(rows))
  parser.add_argument("--seeds", nargs="+", type=int, default=[0])
  parser.add_argument("--base", type=Path, required=True, help="folder of the base runs seed<k>")
  parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
  arguments, flags = parser.parse_known_args()
  unknown = [flag for flag in flags if not flag.startswith("--config.")]
  if unknown:
    parser.error(f"unknown argument {unknown[0]!r}: flags of a run start with --config.")
  for row in arguments.rows:
    for seed in arguments.seeds:
      run(row, rows[row]["start"], seed, arguments.base, arguments.out / row / f"seed{seed}", flags)
  results = {}
  for row in rows:
    done = sorted((arguments.out / row).glob(f"seed*/{COST}"))
    results[row] = {
      int(file.parent.name.removeprefix("seed")): figures(file.parent, rows[row]["stages"]) for file in done
    }
  results = {row: of_seeds for row, of_seeds in results.items() if of_seeds}
  arguments.out.mkdir(parents=True, exist_ok=True)
  (arguments.out / "ablations.json").write_text(json.dumps(results, indent=1) + "\n")
  text = table(results, rows)
  (arguments.out / "ablations.md").write_text(text)
  print(text)


if __name__ == "__main__":
  main()

"""The tables of docs/ablations.md, from a sweep over the rows of `configs/scenes_ablations.py`.

uae-jax sweep --config=configs/scenes.py --workdir=runs/seeds
uae-jax sweep --config=configs/scenes_ablations.py --workdir=runs/ablations --config-points --grid=config.seed=0,1,2
python -m benchmarks.ablations runs/ablations

Reads runs/ablations/sweep.json, writes runs/ablations/ablations.md and prints it: mean and range over seeds, and
differences by seed.
"""

import argparse
import json
import math
from pathlib import Path
import runpy

CONFIG = Path(__file__).parents[1] / "configs" / "scenes_ablations.py"
COLUMNS = {
  "caption_recall": "recall",
  "caption_precision": "precision",
  "caption_length": "length",
  "reward_similarity": "reward",
  "held_out_similarity": "held out",
  "object_accuracy": "objects right",
  "psnr": "PSNR",
  "minutes": "minutes",
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


def read(file: Path) -> dict[str, dict[int, dict[str, float]]]:
  """Row -> seed -> metrics of the finished runs of a sweep."""
  results: dict[str, dict[int, dict[str, float]]] = {}
  for run in json.loads(file.read_text())["runs"]:
    seed = int(run["overrides"].get("seed", 0))
    row = run["name"].removesuffix(f"_seed-{seed}")
    if run["state"] == "finished":
      results.setdefault(row, {})[seed] = run["metrics"] | {"minutes": run["metrics"]["seconds"] / 60}
  return results


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
    paired = [found for found in of_seeds.values() if all(f"paired.{name}.gain" in found for name in GAINS)]
    if paired:
      cells = [
        cell([found[f"paired.{name}.gain"] for found in paired])
        + (f" ± {paired[0][f'paired.{name}.standard_error']:.4f}" if len(paired) == 1 else "")
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
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("sweep", type=Path, help="folder of the sweep")
  folder = parser.parse_args().sweep
  text = table(read(folder / "sweep.json"), runpy.run_path(str(CONFIG))["ROWS"])
  (folder / "ablations.md").write_text(text)
  print(text)


if __name__ == "__main__":
  main()

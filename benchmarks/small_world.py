"""The README's table: held-out metrics of runs of `configs/scenes.py`, mean and range over seeds.

uae-jax sweep --config=configs/scenes.py --workdir=runs/seeds
python -m benchmarks.small_world runs/seeds/seed-0 runs/seeds/seed-1 runs/seeds/seed-2
"""

import argparse
import json
from pathlib import Path

STAGES = ("pretrain", "cold_start", "generation_for_understanding", "understanding_for_generation")
COLUMNS = {
  "caption_recall": "recall",
  "caption_precision": "precision",
  "caption_length": "length",
  "reward_similarity": "reward (CLIP)",
  "held_out_similarity": "held out (DINOv2)",
  "psnr": "PSNR",
  "object_accuracy": "objects right",
  "held_out_pairs_reward_similarity": "unseen pairs, reward",
  "held_out_pairs_held_out_similarity": "unseen pairs, held out",
  "true_caption_reward_similarity": "from true captions",
}


def cell(values: list[float]) -> str:
  digits = 1 if max(map(abs, values)) > 5 else 3
  mean = sum(values) / len(values)
  return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdirs", nargs="+", type=Path)
  workdirs = parser.parse_args().workdirs
  print("| after | " + " | ".join(COLUMNS.values()) + " |")
  print("|---" * (1 + len(COLUMNS)) + "|")
  for stage in STAGES:
    runs = [json.loads((workdir / "evaluation" / f"{stage}.json").read_text()) for workdir in workdirs]
    print(f"| {stage} | " + " | ".join(cell([run[name] for run in runs]) for name in COLUMNS) + " |")
  print("\nStage 3 against stage 2 from the same captions, mean difference and its standard error over scenes:\n")
  print("| run | reward (CLIP) | held out (DINOv2) | PSNR, dB | objects right | from true captions |")
  print("|---|---|---|---|---|---|")
  for workdir in workdirs:
    before, after = (json.loads((workdir / "evaluation" / f"{stage}.json").read_text()) for stage in STAGES[-2:])
    gains = (after["paired"][name] for name in ("reward_similarity", "held_out_similarity", "psnr"))
    cells = [f"{g['gain']:+.4f} ± {g['standard_error']:.4f}" for g in gains]
    cells += [
      f"{before[name]:.3f} to {after[name]:.3f}" for name in ("object_accuracy", "true_caption_object_accuracy")
    ]
    print(f"| {workdir.name} | " + " | ".join(cells) + " |")
  for workdir in workdirs:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    print(f"\n{workdir.name}: {max(line['seconds'] for line in lines) / 60:.1f} minutes")


if __name__ == "__main__":
  main()

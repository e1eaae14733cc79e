"""Understanding and following of finished small-world runs, stage by stage, with paired standard errors over scenes.

uae-jax sweep --config=configs/scenes.py --workdir=runs/seeds
python -m benchmarks.understanding runs/seeds/seed-{0,1,2} --out docs/results/understanding.json
python -m benchmarks.understanding --show docs/results/understanding.json

Understanding is measured without decoding (forced choice between the true caption and one with a single change, see
`small_world.forced_choice`) and at a fixed length (recall and precision of captions cut to half the words of the true
one). Following is measured on images generated from the true captions (`small_world.following`). All stages see the
same scenes, changes, keys and noise. The file has every share, and for the four totals the difference to the stage
before with its standard error.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
import sys

import jax
import numpy as np

from uae_jax import sharding
from uae_jax.data.processing import Processor
from uae_jax.evaluation import held_out
from uae_jax.evaluation.held_out import PLAIN
from uae_jax.evaluation.reconstruction import Reconstructor, paired_gain
from uae_jax.small_world import following, forced_choice, render
from uae_jax.training import restore, sizes
from uae_jax.training.build import build

STAGES = ("cold_start", "generation_for_understanding", "understanding_for_generation")
TITLES = ("1 cold start", "2 Generation for Understanding", "3 Understanding for Generation")
# Totals with one number per scene, whose differences between stages are paired.
PAIRED = {
  "forced_choice": "forced choice",
  "half_recall": "recall, half length",
  "half_precision": "precision, half length",
  "objects_followed": "objects right from true captions",
}


def measure(workdir: Path, num_images: int) -> dict:
  """The figures of every stage of a run: stage -> {"figures": ..., "gains": ...}."""
  found, before = {}, None
  for stage, figures, rows in measure_stages(workdir, STAGES, num_images):
    gains = {} if before is None else {name: paired_gain(before[name], rows[name]) for name in PAIRED}
    found[stage] = {"figures": figures, "gains": gains}
    before = rows
  return found


def measure_stages(workdir: Path, stages: Sequence[str], num_images: int):
  """Yields (folder of a stage, its figures, name of `PAIRED` -> float[N]) of the finished stages of a run."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  config = restore.run_config(workdir)
  built = build(config, sizes.read(workdir), Processor.from_folder(workdir / restore.PROCESSOR), mesh)
  options = dataclasses.replace(config.evaluation, num_images=num_images, embedders=())
  reconstructor = Reconstructor(built.networks, options)
  split = held_out.load(config.data, built.processor, num_images)[PLAIN]
  if split.truth is None:
    raise ValueError(f"{workdir}: data.source = {config.data.source!r} has no ground truth")
  for stage in stages:
    checkpoints = restore.finished_steps(workdir / "checkpoints" / stage)
    params = restore.read_params(checkpoints, built.abstract_params)
    yield stage, *measure_stage(params, reconstructor, split, built.processor, options)


def measure_stage(params, reconstructor: Reconstructor, split, processor: Processor, options):
  """(figures of one stage, name of `PAIRED` -> float[N])."""
  truth, scene = split.truth, split.truth.scene
  length = options.max_new_tokens
  true, _ = processor.caption_rows(split.captions, length)
  choices = truth.forced_choices()
  changed = [processor.caption_rows(choice.captions, length)[0] for choice in choices]
  log_probs = reconstructor.caption_log_probs(params, split.captioner_images, np.stack([true, *changed], axis=1))
  is_right = log_probs[:, :1] > log_probs[:, 1:]
  possible = np.stack([choice.is_possible for choice in choices], axis=1)

  tokens = reconstructor.caption(params, split.captioner_images, temperature=1.0)
  texts = [processor.caption_text(row) for row in tokens]
  scores = truth.scores(texts)
  halves = truth.scores(
    [" ".join(text.split()[: score.true_length // 2]) for text, score in zip(texts, scores, strict=True)]
  )
  images, _ = reconstructor.generate(params, split.images, true, captioner_images=split.captioner_images)
  pixels = (images + 1.0) * 127.5
  objects, _ = render.detect(pixels, scene.config)
  is_followed = (objects == scene.named().objects()) & scene.present

  figures = forced_choice.accuracy(choices, is_right) | truth.figures(texts)
  figures |= {f"true_caption_{name}": value for name, value in following.categories(pixels, scene).items()}
  rows = {
    "forced_choice": np.sum(is_right & possible, axis=1) / np.sum(possible, axis=1),
    "half_recall": np.array([score.recall for score in halves]),
    "half_precision": np.array([score.precision for score in halves]),
    "objects_followed": np.sum(is_followed, axis=1) / np.sum(scene.present, axis=1),
  }
  return figures | {name: float(np.mean(row)) for name, row in rows.items()}, rows


def table(results: dict) -> str:
  """The results as Markdown: shares after each stage, then the paired gains per seed."""
  seeds, runs = results["seeds"], results["runs"]
  names = list(runs[0][STAGES[0]]["figures"])
  lines = ["| | " + " | ".join(TITLES) + " |", "|---" * (1 + len(STAGES)) + "|"]
  for name in names:
    cells = []
    for stage in STAGES:
      values = [run[stage]["figures"][name] for run in runs if name in run[stage]["figures"]]
      cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
    lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
  lines += ["", "| gain | seed | " + " | ".join(TITLES[1:]) + " |", "|---|---|---|---|"]
  for name, title in PAIRED.items():
    for seed, run in zip(seeds, runs, strict=True):
      gains = [run[stage]["gains"][name] for stage in STAGES[1:]]
      cells = [f"{gain['gain']:+.4f} ± {gain['standard_error']:.4f}" for gain in gains]
      lines.append(f"| {title} | {seed} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdirs", nargs="*", type=Path, help="finished runs of configs/scenes.py, one per seed")
  parser.add_argument("--out", type=Path, help="JSON file of the results")
  parser.add_argument("--show", type=Path, help="print the tables of such a file and measure nothing")
  parser.add_argument("--images", type=int, default=768, help="held-out scenes")
  arguments = parser.parse_args()
  if arguments.show:
    print(table(json.loads(arguments.show.read_text())))
    return 0
  if not arguments.workdirs or not arguments.out:
    parser.error("name the runs and --out FILE, or --show FILE")
  seeds = [restore.run_config(workdir).seed for workdir in arguments.workdirs]
  results = {"seeds": seeds, "images": arguments.images, "stages": list(STAGES)}
  results["runs"] = [measure(workdir, arguments.images) for workdir in arguments.workdirs]
  arguments.out.parent.mkdir(parents=True, exist_ok=True)
  arguments.out.write_text(json.dumps(results, indent=1) + "\n")
  print(table(results))
  return 0


if __name__ == "__main__":
  sys.exit(main())

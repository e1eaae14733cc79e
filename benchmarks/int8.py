"""Accuracy of int8: evaluates a run of `configs/scenes.py` with stored and with int8 weights on held-out scenes.

python -m benchmarks.int8 runs/demo
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import uae_jax
from uae_jax.evaluation import held_out
from uae_jax.options import DataOptions


def figures(uae: uae_jax.UAE, split: held_out.HeldOut) -> tuple[dict[str, float], list[str]]:
  """(metrics, captions) of greedy captions and of the images generated from them."""
  originals = [Image.fromarray(image) for image in split.images]
  captions, reconstructions = uae.reconstruct(originals, temperature=0.0, output="array")
  errors = np.mean((reconstructions - split.images / 255.0) ** 2, axis=(1, 2, 3))
  told = split.figures(captions)
  return {
    "MB": sum(leaf.nbytes for leaf in jax.tree.leaves(uae.params)) / 1e6,
    "recall": told["caption_recall"],
    "precision": told["caption_precision"],
    "PSNR, dB": float(np.mean(-10 * np.log10(errors))),
    "objects right": split.truth.image_figures(reconstructions * 255.0)["object_accuracy"],
  }, captions


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdirs", nargs="+", type=Path)
  parser.add_argument("--images", type=int, default=192)
  arguments = parser.parse_args()
  for workdir in arguments.workdirs:
    uae = uae_jax.UAE.load(workdir, dtype="float32")
    split = held_out.load(DataOptions(), uae.processor, arguments.images)[held_out.PLAIN]
    exact, captions = figures(uae, split)
    rounded, others = figures(uae_jax.UAE.load(workdir, dtype="float32", int8=True), split)
    same = np.mean([one == other for one, other in zip(captions, others, strict=True)])
    print(f"\n| {workdir.name} | " + " | ".join(exact) + " |\n" + "|---" * (1 + len(exact)) + "|")
    for name, row in (("float32", exact), ("int8", rounded)):
      print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    print(f"\nCaptions unchanged: {same:.3f}")


if __name__ == "__main__":
  main()

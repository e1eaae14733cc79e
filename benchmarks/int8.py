"""Accuracy of int8: a run of `configs/scenes.py` on held-out scenes, as stored and with both forms of int8.

python -m benchmarks.int8 runs/demo
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import uae_jax
from uae_jax.evaluation import held_out
from uae_jax.layers.quantized import Int8Weight
from uae_jax.training.restore import run_config


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
    split = held_out.load(run_config(workdir).data, uae.processor, arguments.images)[held_out.PLAIN]
    exact, captions = figures(uae, split)
    print(f"\n| {workdir.name} | " + " | ".join(exact) + " | captions unchanged |\n" + "|---" * (2 + len(exact)) + "|")
    print_row("float32", exact, captions, captions)
    uae = uae_jax.UAE.load(workdir, dtype="float32", int8=True)
    print_row("int8_weights", *figures(uae, split), captions)
    uae.params = jax.tree.map(with_rounded_activations, uae.params, is_leaf=lambda x: isinstance(x, Int8Weight))
    print_row("int8", *figures(uae, split), captions)


def with_rounded_activations(leaf):
  return dataclasses.replace(leaf, rounds_activations=True) if isinstance(leaf, Int8Weight) else leaf


def print_row(name: str, row: dict[str, float], captions: list[str], exact: list[str]) -> None:
  same = np.mean([one == other for one, other in zip(captions, exact, strict=True)])
  print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*row.values(), same)) + " |", flush=True)


if __name__ == "__main__":
  main()

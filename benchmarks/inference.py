"""Captions and images of a trained model in batches against a loop of one item at a time, on the same items.

python -m benchmarks.inference runs/demo --items 32 --batch-sizes 8,32

Prints, per batch size, processor seconds and wall seconds per item, the ratio of the loop to each, and how many outputs
are equal. Processor time counts all threads and hardly depends on what else the machine does; methods alternate.
Programs are compiled before anything is measured. Peers, `generate` of transformers and the decoder of diffusers in
batches, are the suites `rollout` and `sampling` of `python -m benchmarks`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
import statistics
import time

import numpy as np
from PIL import Image

from uae_jax import UAE
from uae_jax.small_world import phrases, render, scenes

# An item is the same if no pixel differs by more than rounding.
LARGEST_DIFFERENCE = 1


def timed(run: Callable[[], list]) -> tuple[float, float, list]:
  """(processor seconds, wall seconds, result) of a call."""
  processor, wall = time.process_time(), time.perf_counter()
  result = run()
  return time.process_time() - processor, time.perf_counter() - wall, result


def in_batches(work: Callable[[list[int]], list], count: int, size: int) -> Callable[[], list]:
  """A function that works on all items, at most `size` per call."""
  return lambda: [
    result for start in range(0, count, size) for result in work(list(range(start, min(start + size, count))))
  ]


def compare(work: Callable[[list[int]], list], count: int, sizes: Sequence[int], repeats: int) -> list[str]:
  """Lines of a table: the loop, then each batch size."""
  methods = {size: in_batches(work, count, size) for size in (1, *sizes)}
  outputs = {size: run() for size, run in methods.items()}  # compiles
  seconds: dict[int, list[tuple[float, float]]] = {size: [] for size in methods}
  for _ in range(repeats):
    for size, run in methods.items():
      seconds[size].append(timed(run)[:2])
  medians = {
    size: [statistics.median(column) / count for column in zip(*rows, strict=True)] for size, rows in seconds.items()
  }
  lines = []
  for size, (processor, wall) in medians.items():
    same = sum(is_same(one, other) for one, other in zip(outputs[1], outputs[size], strict=True))
    times = f"{1000 * processor:8.1f} ms processor  {1000 * wall:8.1f} ms wall"
    lines.append(f"  batch {size:3}  {times}  {medians[1][0] / processor:5.2f} x  {same}/{count} equal")
  return lines


def is_same(one: str | Image.Image, other: str | Image.Image) -> bool:
  if isinstance(one, str):
    return one == other
  return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) <= LARGEST_DIFFERENCE


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.split("\n", 1)[0])
  parser.add_argument("model", type=Path, help="workdir of a small-world run")
  parser.add_argument("--items", type=int, default=32)
  parser.add_argument("--batch-sizes", default="8,32")
  parser.add_argument("--repeats", type=int, default=3)
  arguments = parser.parse_args(argv)
  sizes = [int(size) for size in arguments.batch_sizes.split(",")]
  uae = UAE.load(arguments.model, dtype="auto")
  batch = scenes.scenes(np.arange(arguments.items), "held_out")
  images = [Image.fromarray(image) for image in render.render_batch(batch)]
  prompts = phrases.captions_text(batch, "full")

  def caption(rows: list[int]) -> list[str]:
    return uae.caption([images[row] for row in rows], indices=rows, batch_size=len(rows))

  def generate(rows: list[int]) -> list[Image.Image]:
    return uae.generate([prompts[row] for row in rows], indices=rows, batch_size=len(rows))

  for name, work in (("captions", caption), ("images", generate)):
    print(f"{name}, {arguments.items} items, median of {arguments.repeats}", flush=True)
    print("\n".join(compare(work, arguments.items, sizes, arguments.repeats)), flush=True)


if __name__ == "__main__":
  main()

"""Batches of photographs from a folder with grain: decoded, cropped, resized, tokenized."""

from pathlib import Path
import tempfile

from benchmarks import photographs
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions
from uae_jax.small_world.processor import make_tokenizer


def cases(world: World) -> dict:
  size = world.size

  def folder(threads):
    place = photographs.write(Path(tempfile.gettempdir()) / f"benchmarks_photographs_{size.name}", size)
    data = DataOptions(source=f"folder:{place}", image_px=size.caption_px, caption_tokens=photographs.CAPTION_TOKENS)
    dataset = make_dataset(
      open_source(data, "train"),
      data,
      make_tokenizer(),
      captions="full",
      batch_size=size.encoder_batch,
      seed=0,
      num_threads=threads,
    )
    batches = iter(dataset)

    def run():
      for _ in range(photographs.BATCHES):
        next(batches)

    return Case(run=run, unit="images", amount=photographs.BATCHES * size.encoder_batch)

  return {f"{photographs.SIDE_PX} px JPEG to {size.caption_px} px": lambda: folder(2)}

"""Batches of photographs from a folder with grain: decoded, cropped, resized, tokenized."""

from pathlib import Path
import tempfile

from benchmarks import inputs, photographs
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.processing import Processor
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions
from uae_jax.small_world.processor import ProcessorConfig, write_processor


def cases(world: World) -> dict:
  size = world.size

  def folder(threads):
    place = photographs.write(Path(tempfile.gettempdir()) / f"benchmarks_photographs_{size.name}", size)
    data = DataOptions(source=f"folder:{place}", image_px=size.caption_px, caption_tokens=photographs.CAPTION_TOKENS)
    with tempfile.TemporaryDirectory() as files:
      write_processor(files, ProcessorConfig(size.caption_px, inputs.PATCH_PX, inputs.MERGE))
      processor = Processor.from_folder(files)
    dataset = make_dataset(
      open_source(data, "train"),
      data,
      processor,
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

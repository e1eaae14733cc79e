"""The small world on disk, as a TFDS dataset of ArrayRecord files: `tfds:uae_scenes/plain`.

  python -m uae_jax.small_world.tfds --data_dir=DIR --num_train=50000 [--variant=plain]
  uae-jax train --config=configs/scenes.py --config.data.source=tfds:uae_scenes/plain --config.data.data_dir=DIR

The files are plain TFDS: any program reads them with `tfds.builder("uae_scenes/plain", data_dir=DIR)`.
"""

import argparse
import functools

import numpy as np

from uae_jax.small_world import phrases, render, scenes

NAME = "uae_scenes"
BLOCK = 1024  # Scenes generated at a time.


@functools.cache
def builder_class():
  """The TFDS builder class; imports TensorFlow and TFDS only when called."""
  import tensorflow_datasets as tfds

  class UaeScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes with full captions and ground truth; one builder config per variant."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name=name, description=str(config)) for name, config in scenes.VARIANTS.items()
    ]

    def __init__(self, *, num_records: dict[str, int] | None = None, **options):
      self._num_records = num_records or {}
      super().__init__(file_format="array_record", **options)

    def _info(self):
      config = scenes.variant(self.builder_config.name)
      return tfds.core.DatasetInfo(
        builder=self,
        description="Scenes of 1 to 6 objects with full captions and ground truth.",
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(shape=(config.image_px, config.image_px, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "scene": tfds.features.Tensor(shape=(1 + len(config.places),), dtype=np.int32),
            "index": np.int64,
          }
        ),
        supervised_keys=("image", "caption"),
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # Nothing to download.
      return {split: self._generate_examples(split) for split in self._num_records}

    def _generate_examples(self, split):
      config = scenes.variant(self.builder_config.name)
      for start in range(0, self._num_records[split], BLOCK):
        indices = np.arange(start, min(start + BLOCK, self._num_records[split]))
        batch = scenes.scenes(indices, split, config)
        captions = phrases.captions_text(batch, "full")
        rows = zip(indices, render.render_batch(batch), captions, batch.to_array(), strict=True)
        for index, image, caption, scene in rows:
          yield int(index), {"image": image, "caption": caption, "scene": scene, "index": index}

  # TFDS looks for documentation files next to a dotted module, in 4.9.10 with a package that it does not require.
  UaeScenes.__module__ = NAME
  return UaeScenes


def build(data_dir: str, num_records: dict[str, int], variant: str = "plain") -> None:
  """Writes the dataset under `data_dir`, unless it exists.

  Args:
    data_dir: folder of TFDS datasets.
    num_records: number of records per split.
    variant: variant of the small world, a key of `scenes.VARIANTS`.

  Raises:
    ValueError: the variant is unknown, or there is a dataset with other numbers of records.
  """
  scenes.variant(variant)
  builder = builder_class()(data_dir=data_dir, config=variant, num_records=num_records)
  builder.download_and_prepare()
  found = {split: info.num_examples for split, info in builder.info.splits.items()}
  if found != num_records:
    raise ValueError(f"{builder.data_dir} has {found}, wanted {num_records}: remove it or choose another --data_dir")


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m uae_jax.small_world.tfds", description="Writes the small world to disk."
  )
  parser.add_argument("--data_dir", required=True, help="folder of TFDS datasets")
  parser.add_argument("--num_train", type=int, required=True, help="training scenes")
  parser.add_argument("--num_held_out", type=int, default=1024, help="scenes of each held-out split")
  parser.add_argument("--variant", default="plain", choices=tuple(scenes.VARIANTS), help="variant of the small world")
  arguments = parser.parse_args(argv)
  num_held_out = arguments.num_held_out
  num_records = {"train": arguments.num_train, "held_out": num_held_out, "held_out_pairs": num_held_out}
  build(arguments.data_dir, num_records, arguments.variant)
  print(f"--config.data.source=tfds:{NAME}/{arguments.variant} --config.data.data_dir={arguments.data_dir}")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())

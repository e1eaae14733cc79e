"""Batches of photographs from a folder with PyTorch's DataLoader and two workers."""

from pathlib import Path
import tempfile

import numpy as np
from PIL import Image, ImageOps
import torch

from benchmarks import photographs
from benchmarks.timing import Case
from benchmarks.torch_peers.nets import Nets
from uae_jax.small_world.processor import make_tokenizer


class Photographs(torch.utils.data.Dataset):
  """Dataset: index -> (image, tokens)."""

  def __init__(self, folder: Path, side: int):
    self._files, self._side = sorted(folder.glob("*.jpg")), side
    self._tokenizer = make_tokenizer()

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict:
    with Image.open(self._files[index]) as picture:
      picture = ImageOps.fit(picture.convert("RGB"), (self._side, self._side), Image.Resampling.BICUBIC)
    text = self._files[index].with_suffix(".txt").read_text()
    tokens = self._tokenizer(text, padding="max_length", max_length=photographs.CAPTION_TOKENS)["input_ids"]
    return {"image": np.array(picture), "tokens": np.asarray(tokens, np.int32)}


def cases(nets: Nets) -> dict:
  size = nets.size

  def folder():
    place = photographs.write(Path(tempfile.gettempdir()) / f"benchmarks_photographs_{size.name}", size)
    dataset = Photographs(place, size.caption_px)
    loader = torch.utils.data.DataLoader(
      dataset, size.encoder_batch, shuffle=True, num_workers=2, persistent_workers=True
    )

    def endless():
      while True:
        yield from loader

    batches = iter(endless())

    def run():
      for _ in range(photographs.BATCHES):
        next(batches)

    return Case(run=run, unit="images", amount=photographs.BATCHES * size.encoder_batch)

  return {f"{photographs.SIDE_PX} px JPEG to {size.caption_px} px": folder}

"""Creates a folder of captioned JPEG files for the input suite."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import inputs
from benchmarks.sizes import Size

SIDE_PX = 512
BATCHES = 4  # per run
CAPTION_TOKENS = 26


def write(folder: Path, size: Size) -> Path:
  """Writes the files that one run reads: smooth noise, which compresses like photographs."""
  folder.mkdir(exist_ok=True)
  for i in range(BATCHES * size.encoder_batch):
    file = folder / f"{i:05d}.jpg"
    if not file.exists():
      coarse = inputs.images(size, SIDE_PX // 16, 1, seed=i)[0]
      picture = Image.fromarray(coarse).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
      fine = np.random.default_rng(i).normal(0, 6, (SIDE_PX, SIDE_PX, 3))
      Image.fromarray(np.clip(np.asarray(picture) + fine, 0, 255).astype(np.uint8)).save(file, quality=90)
      file.with_suffix(".txt").write_text("red circle left of blue square")
  return folder

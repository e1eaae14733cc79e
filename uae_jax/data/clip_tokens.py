"""Token ids for the CLIP text towers of SD3."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uae_jax.data import processor_files


def encode(folder: str | Path, texts: Sequence[str], length: int) -> np.ndarray:
  """Token ids int32[B, length]: start, words, end, padding (`end` for the first text tower, `!` for the second).

  Args:
    folder: folder of the tokenizer's files.
    texts: B texts; longer ones are truncated.
    length: number of tokens per row.

  Raises:
    ValueError: the tokenizer cannot be read.
  """
  tokenizer = processor_files.read_clip_tokenizer(Path(folder))
  rows = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)["input_ids"]
  return np.asarray(rows, np.int32)

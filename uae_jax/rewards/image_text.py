"""Rewards from an embedder with two towers: how close an image is to the text it was generated from.

Source: CLIPScore (arXiv 2104.08718), without its factor 2.5 and its floor at 0, which change no order within a group
of positive similarities; PickScore (arXiv 2305.01569) with its factor exp(logit_scale); HPS v2 (arXiv 2306.09341).
"""

from collections.abc import Callable, Sequence

import numpy as np

from uae_jax.embedders.text import ImageTextEmbedder


class ImageTextReward:
  """score_scale * cos(image, text) of generated images and their captions; the networks are loaded by the first call.

  Args:
    load: returns the embedder.
  """

  def __init__(self, load: Callable[[], ImageTextEmbedder]):
    self._load = load
    self._embedder: ImageTextEmbedder | None = None

  def __call__(self, captions: Sequence[Sequence[str]], images: np.ndarray) -> np.ndarray:
    """Computes the rewards of a batch.

    Args:
      captions: captions of the rollouts, one sequence per prompt.
      images: uint8[prompts, rollouts, H, W, 3].

    Returns:
      float32[prompts, rollouts].
    """
    if self._embedder is None:
      self._embedder = self._load()
    num_prompts, num_rollouts = images.shape[:2]
    # The rollouts of a group often share their caption.
    texts = list(dict.fromkeys(text for group in captions for text in group))
    rows = {text: row for text, row in zip(texts, self._embedder.text.embed(texts)[0], strict=True)}
    embedded = self._embedder.embed(list(images.reshape(-1, *images.shape[2:])))
    expected = np.stack([rows[text] for group in captions for text in group])
    cosines = np.sum(embedded * expected, axis=-1, dtype=np.float32).reshape(num_prompts, num_rollouts)
    return cosines * np.float32(self._embedder.score_scale)

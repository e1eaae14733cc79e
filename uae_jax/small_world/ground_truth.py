"""Ground truth of small-world images: scores captions and reconstructions against their scenes."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world import caption_scores, render, scenes
from uae_jax.small_world.scenes import Scene

_EDIT_STREAM = 3


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
  """The ground truth of N images.

  Attributes:
    scene: batch of the N scenes.
  """

  scene: Scene

  def first(self, count: int) -> "GroundTruth":
    return GroundTruth(self.scene[:count])

  def scores(self, texts: Sequence[str]) -> list[caption_scores.CaptionScore]:
    """Scores each caption against the scene of its row; there may be fewer captions than scenes."""
    return [caption_scores.score(text, self.scene[row]) for row, text in enumerate(texts)]

  def figures(self, texts: Sequence[str]) -> dict[str, float]:
    """Recall, precision and lengths of captions, see `caption_scores.aggregate`."""
    return caption_scores.aggregate(self.scores(texts))

  def image_figures(self, images: np.ndarray) -> dict[str, float]:
    """`object_accuracy` and `scene_accuracy` of reconstructions uint8 or float [N, 32, 32, 3] in 0..255."""
    return render.detection_accuracy(images, self.scene)

  def edited_images(self) -> np.ndarray:
    """Images uint8[N, 32, 32, 3] of the scenes after one edit each; the edits are the same on every call."""
    rows = np.arange(len(self.scene.background))
    return render.render_batch(scenes.edit(self.scene, Draws(rows, _EDIT_STREAM)))

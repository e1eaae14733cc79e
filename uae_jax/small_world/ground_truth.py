"""Ground truth of small-world images: scores captions and reconstructions against their scenes."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world import caption_scores, following, forced_choice, render, scenes
from uae_jax.small_world.forced_choice import ForcedChoice
from uae_jax.small_world.scenes import Scene

_EDIT_STREAM, _CHOICE_STREAM = 3, 4


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
    """Recall, precision and lengths of captions, see `caption_scores.aggregate`, and the first two at half length.

    At half length, a caption is cut to half as many words as the full caption has: what it says first counts, and more
    words gain nothing.
    """
    scores = self.scores(texts)
    halves = [" ".join(text.split()[: score.true_length // 2]) for text, score in zip(texts, scores, strict=True)]
    at_half = caption_scores.aggregate(self.scores(halves))
    names = ("caption_recall", "caption_precision")
    return caption_scores.aggregate(scores) | {f"half_{name}": at_half[name] for name in names}

  def image_figures(self, images: np.ndarray) -> dict[str, float]:
    """`object_accuracy` and `scene_accuracy` of reconstructions uint8 or float [N, side, side, 3] in 0..255."""
    return render.detection_accuracy(images, self.scene)

  def following(self, images: np.ndarray) -> dict[str, float]:
    """How well images generated from the true captions follow them, see `following.categories`."""
    return following.categories(images, self.scene)

  def forced_choices(self) -> list[ForcedChoice]:
    """A changed caption of every kind for every scene, the same on every call."""
    return forced_choice.forced_choices(self.scene, Draws(np.arange(len(self.scene.background)), _CHOICE_STREAM))

  def choice_figures(self, choices: list[ForcedChoice], is_right: np.ndarray) -> dict[str, float]:
    """Shares of right choices, given bool[N, kinds]; see `forced_choice.accuracy`."""
    return forced_choice.accuracy(choices, is_right)

  def edited_images(self) -> np.ndarray:
    """Images uint8[N, side, side, 3] of the scenes after one edit each; the edits are the same on every call."""
    rows = np.arange(len(self.scene.background))
    return render.render_batch(scenes.edit(self.scene, Draws(rows, _EDIT_STREAM)))

"""Options of the stage that trains image tokens, for models that generate images token by token."""

import dataclasses

from uae_jax.options.base import option
from uae_jax.options.objectives import TokenObjective
from uae_jax.options.reinforcement import ReinforcementStage
from uae_jax.options.rewards import TEXT_REWARDS
from uae_jax.options.sampling import DATASET, SAMPLED, CaptionOptions, RewardOptions, TokenOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenOptions(CaptionOptions, RewardOptions):
  """Groups of images, sampled token by token, compete for the best match of one caption.

  Attributes:
    captions: "sampled" by the model itself, or those of the "dataset".
    guidance: scale of classifier-free guidance on the logits; 1 disables it. The policy is the guided distribution.
    image_temperature: divides the guided logits of image tokens.
    image_top_k: sample among the k most likely image tokens; 0 disables it.
    logit_chunks: number of sequential chunks of an image's tokens, of which one holds its logits at a time.
  """

  captions: str = option(SAMPLED, choices=(SAMPLED, DATASET))
  temperature: float = option(0.7, at_least=0)
  guidance: float = option(5.0, more_than=0)
  image_temperature: float = option(1.0, more_than=0)
  image_top_k: int = option(0, at_least=0)
  logit_chunks: int = option(1, at_least=1)

  def check(self) -> None:
    TokenOptions.check(self)
    RewardOptions.check(self)
    if self.captions == DATASET:
      self.refuse_inert(tuple(self.token_sampling), "captions = 'dataset'")
    if self.image_top_k == 1:
      raise ValueError("image_top_k = 1: all images of a group would be the same, so there is nothing to learn")
    if texts := [name for name in self.reward_names if name in TEXT_REWARDS]:
      raise ValueError(f"reward_weights names {texts}: all rollouts of a group have one caption in this stage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenStage(ReinforcementStage):
  """Stage 3 of a model that generates images token by token: token GRPO on image tokens.

  Attributes:
    options: see `ImageTokenOptions`.
    objective: see `TokenObjective`.
  """

  trainable: str = option("^captioner/.*lora_", is_regex=True)
  options: ImageTokenOptions = ImageTokenOptions()
  objective: TokenObjective = TokenObjective()

  def check(self) -> None:
    super().check()
    self.check_reference(self.objective.beta)

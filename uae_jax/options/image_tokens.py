"""Options of the stages that train image tokens, for models that generate images token by token."""

import dataclasses

from uae_jax.options.base import Options, option
from uae_jax.options.objectives import TokenObjective
from uae_jax.options.reinforcement import ReinforcementStage
from uae_jax.options.rewards import TEXT_REWARDS
from uae_jax.options.sampling import DATASET, SAMPLED, CaptionOptions, RewardOptions, TokenOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePolicyOptions(Options):
  """The distribution of image tokens.

  Attributes:
    guidance: scale of classifier-free guidance on the logits; 1 disables it. The policy is the guided distribution.
    image_temperature: divides the guided logits of image tokens.
    image_top_k: sample among the k most likely image tokens; 0 disables it.
    logit_chunks: number of sequential chunks of the tokens of an image, or of a caption, of which one holds its logits
      at a time.
  """

  guidance: float = option(5.0, more_than=0)
  image_temperature: float = option(1.0, more_than=0)
  image_top_k: int = option(0, at_least=0)
  logit_chunks: int = option(1, at_least=1)

  def check(self) -> None:
    if self.image_top_k == 1:
      raise ValueError("image_top_k = 1: all images of a group would be the same, so there is nothing to learn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenOptions(CaptionOptions, ImagePolicyOptions, RewardOptions):
  """Groups of images, sampled token by token, compete for the best match of one caption.

  Attributes:
    captions: "sampled" by the model itself, or those of the "dataset".
  """

  captions: str = option(SAMPLED, choices=(SAMPLED, DATASET))
  temperature: float = option(0.7, at_least=0)

  def check(self) -> None:
    TokenOptions.check(self)
    ImagePolicyOptions.check(self)
    RewardOptions.check(self)
    if self.captions == DATASET:
      self.refuse_inert(tuple(self.token_sampling), "captions = 'dataset'")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointTokenOptions(CaptionOptions, ImagePolicyOptions, RewardOptions):
  """A tree of rollouts: captions of an image compete, and so do the images of each caption.

  Attributes:
    num_rollouts: captions per image.
    images_per_caption: images per caption.
    image_weight: weight of the objective of image tokens; that of captions has weight 1.
  """

  max_new_tokens: int = option(512, at_least=2)
  temperature: float = option(1.0, more_than=0)
  images_per_caption: int = option(4, at_least=2)
  image_weight: float = option(1.0, more_than=0)

  @property
  def images_per_prompt(self) -> int:
    return self.num_rollouts * self.images_per_caption

  def check(self) -> None:
    TokenOptions.check(self)
    ImagePolicyOptions.check(self)
    RewardOptions.check(self)
    if self.top_k == 1:
      raise ValueError("top_k = 1: all captions of a group would be the same, so there is nothing to learn")
    if texts := [name for name in self.reward_names if name in TEXT_REWARDS]:
      raise ValueError(f"reward_weights names {texts}: the images of a caption share it in this stage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointTokenStage(ReinforcementStage):
  """Stages 2 and 3 in one step, of a model that generates images token by token: token GRPO on both kinds of tokens.

  Attributes:
    options: see `JointTokenOptions`.
    objective: of both kinds of tokens, see `TokenObjective`.
  """

  trainable: str = option("^captioner/.*lora_", is_regex=True)
  options: JointTokenOptions = JointTokenOptions()
  objective: TokenObjective = TokenObjective()

  def check(self) -> None:
    super().check()
    self.check_reference(self.objective.beta)

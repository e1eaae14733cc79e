"""Options of the supervised stages: a section of the config per stage, its own options under `options`.

A section's `trainable` is a regular expression searched in parameter paths such as `decoder/layers/image/out/lora_a`.
"""

import dataclasses

from uae_jax.options.base import Options, option
from uae_jax.options.optimization import OptimizerOptions
from uae_jax.options.sampling import (
  CONDITIONINGS,
  DATASET,
  SAMPLED,
  TEXT_TOWERS,
  GenerationOptions,
  ShiftOptions,
  TokenOptions,
)

CAPTIONS = ("full", "partial", "mixed", "contrastive")
FLOAT, INT8, INT8_WEIGHTS = "float", "int8", "int8_weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Options):
  """What every stage has: how long, on what data, which parameters train, and how.

  Attributes:
    total_steps: number of steps (state, batch) -> state.
    batch_size: rows per step on all devices together.
    captions: captions of the batch: "full", or, for scenes of the small world, "partial", "mixed" (60 % full) or
      "contrastive" (each scene with three edited versions).
    trainable: regular expression of the parameters that train.
    ema_decay: decay of the moving average used for evaluation and by the next stage; 0 keeps none.
    ema_interval: optimizer steps between two updates of that average. It then looks back about
      ema_interval / (1 - ema_decay) steps: Flow-GRPO's 0.9 with an interval of 8 is like 0.987 at every step.
    log_every_steps: interval of metrics.
    save_every_steps: interval of checkpoints.
    optimizer: optimizer of the stage.
  """

  total_steps: int = option(1000, at_least=1)
  batch_size: int = option(32, at_least=1)
  captions: str = option("full", choices=CAPTIONS)
  trainable: str = option("", is_regex=True)
  ema_decay: float = option(0.0, at_least=0, less_than=1)
  ema_interval: int = option(1, at_least=1)
  log_every_steps: int = option(10, at_least=1)
  save_every_steps: int = option(200, at_least=1)
  optimizer: OptimizerOptions = OptimizerOptions()

  def check(self) -> None:
    if not self.ema_decay:
      self.refuse_inert(("ema_interval",), "ema_decay = 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedStage(Stage):
  """A stage that minimizes a loss.

  Attributes:
    target_loss: the stage ends early once its average loss is below this value; 0 disables.
    num_microbatches: microbatches per step, whose gradients are added; loss and gradient do not depend on it.
  """

  target_loss: float = option(0.0, at_least=0)
  num_microbatches: int = option(1, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterStage(Stage):
  """A stage that trains adapters on frozen weights.

  Attributes:
    frozen_weights: the matrices in the blocks of captioner and decoder while the stage trains: "float" as they are;
      "int8_weights" as int8 with a scale per output channel, half the memory and half the all-gathers of bfloat16;
      "int8" in the same form, and the inputs of these matrices are rounded to int8 per token as well, at twice the rate
      of bfloat16 on v5e and v6e. Adapters keep their precision. The stage ends with the original weights.
  """

  frozen_weights: str = option(FLOAT, choices=(FLOAT, INT8, INT8_WEIGHTS))


# --- Base models: what CLIP, DINOv2, the SD3 VAE and Qwen2.5-VL are to a real run -------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveOptions(Options):
  """Contrastive training of an embedder.

  Attributes:
    pixel_noise_std: images get Gaussian noise whose std is drawn from U(0, pixel_noise_std), images in [-1, 1].
  """

  pixel_noise_std: float = option(0.2, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveStage(SupervisedStage):
  """An embedder learns from image-caption pairs.

  Attributes:
    options: see `ContrastiveOptions`.
  """

  captions: str = option("contrastive", choices=CAPTIONS)
  options: ContrastiveOptions = ContrastiveOptions()

  def check(self) -> None:
    super().check()
    if self.num_microbatches > 1:
      raise ValueError(
        f"num_microbatches = {self.num_microbatches}: a contrastive loss needs all negatives of its batch at once"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEOptions(Options):
  """Weights of the VAE's loss beside the mean squared error.

  Attributes:
    absolute_weight: weight of the mean absolute error.
    kl_weight: weight of the KL to N(0, 1).
  """

  absolute_weight: float = option(0.1, at_least=0)
  kl_weight: float = option(2e-4, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEStage(SupervisedStage):
  """The VAE learns to reconstruct images.

  Attributes:
    options: see `VAEOptions`.
  """

  trainable: str = option("^vae/", is_regex=True)
  options: VAEOptions = VAEOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionerOptions(Options):
  """Next-token prediction of captions.

  Attributes:
    pixel_noise_std_255: std of Gaussian noise on the image, in gray levels of 255.
    text_only_weight: weight of the loss on captions without an image, in the generation template. Both losses are
      divided by the number of caption tokens.
  """

  pixel_noise_std_255: float = option(6.0, at_least=0)
  text_only_weight: float = option(0.15, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionerStage(SupervisedStage):
  """The captioner learns captions by next-token prediction.

  Attributes:
    options: see `CaptionerOptions`.
  """

  trainable: str = option("^captioner/(?!.*lora_)", is_regex=True)
  options: CaptionerOptions = CaptionerOptions()


# --- Stages 0 and 1 ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(ShiftOptions):
  """Rectified flow on long captions.

  Attributes:
    context_dropout: probability that the negative prompt replaces the caption, for classifier-free guidance.
  """

  context_dropout: float = option(0.0, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainStage(SupervisedStage):
  """Stage 0: the decoder learns to generate from long captions.

  Attributes:
    options: see `PretrainOptions`.
  """

  trainable: str = option("^(decoder|connector)/(?!.*lora_)", is_regex=True)
  options: PretrainOptions = PretrainOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColdStartOptions(TokenOptions, GenerationOptions):
  """Semantic reconstruction with gradients through the whole auto-encoder.

  Attributes:
    captions: "dataset" teacher-forces the batch's captions, "sampled" uses the captioner's own.
    gradient_steps: number of last sampler steps that are differentiated.
    flow_weight: weight of the flow-matching loss on the batch's captions, which keeps the decoder a decoder.
    embedder: embedder that compares original and reconstruction.
  """

  conditioning: str = option("answer", choices=CONDITIONINGS)
  text_tower: str = option("policy", choices=TEXT_TOWERS)
  guidance: float = option(5.0, more_than=0)
  captions: str = option(DATASET, choices=(DATASET, SAMPLED))
  gradient_steps: int = option(10, at_least=1)
  flow_weight: float = option(0.0, at_least=0)
  embedder: str = "clip"

  def check(self) -> None:
    TokenOptions.check(self)
    GenerationOptions.check(self)
    if self.gradient_steps > self.sampler_steps:
      raise ValueError(f"gradient_steps = {self.gradient_steps}: expected at most sampler_steps = {self.sampler_steps}")
    if self.captions == DATASET:
      self.refuse_inert(tuple(self.token_sampling), "captions = 'dataset'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColdStartStage(SupervisedStage, AdapterStage):
  """Stage 1: connector and adapters learn to reconstruct images by way of captions.

  Attributes:
    options: see `ColdStartOptions`.
  """

  trainable: str = option("lora_|^connector/", is_regex=True)
  options: ColdStartOptions = ColdStartOptions()

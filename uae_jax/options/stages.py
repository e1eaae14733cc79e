"""Options of the stages: a section of the config per stage, with the options that only this stage has under `options`.

A section's `trainable` is a regular expression searched in parameter paths such as `decoder/layers/image/out/lora_a`.
"""

import dataclasses

from uae_jax.options.base import Options, option
from uae_jax.options.objectives import ImageObjective, TokenObjective
from uae_jax.options.optimization import AdvantageOptions, OptimizerOptions, ReferenceOptions, UpdateOptions
from uae_jax.options.rewards import EXTERNAL, TEXT_REWARDS, ExternalRewardOptions, TextRewardOptions
from uae_jax.options.sampling import (
  CONDITIONINGS,
  DATASET,
  SAMPLED,
  TEXT_TOWERS,
  CaptionOptions,
  GenerationOptions,
  RewardOptions,
  ShiftOptions,
  TokenOptions,
)

CAPTIONS = ("full", "partial", "mixed", "contrastive")
SDE_SAMPLERS = ("flow", "cps", "dance")
ODE = "ode"
WINDOW_STRATEGIES = ("fixed", "random", "progressive")
NOISING_DENSITIES = ("logit_normal", "mode", "uniform")
CURRENT, OLD = "current", "old"
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


# --- Stages 2 and 3 ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcementStage(AdapterStage):
  """What both RL stages share.

  Attributes:
    advantage: how rewards become advantages.
    updates: epochs, minibatches and microbatches per rollout.
    reference: what the KL of `objective.beta` pulls toward.
    http_reward: the external reward, used if `options.reward_weights` names "http".
  """

  advantage: AdvantageOptions = AdvantageOptions()
  updates: UpdateOptions = UpdateOptions()
  reference: ReferenceOptions = ReferenceOptions()
  http_reward: ExternalRewardOptions = ExternalRewardOptions()
  options: RewardOptions = RewardOptions()

  def check(self) -> None:
    super().check()
    cuts = self.updates.num_minibatches * self.updates.num_microbatches
    if self.batch_size % cuts:
      raise ValueError(
        f"batch_size = {self.batch_size} is not divisible by num_minibatches * num_microbatches = {cuts} of updates"
      )
    if self.batch_size % self.http_reward.num_pieces:
      raise ValueError(
        f"http_reward.num_pieces = {self.http_reward.num_pieces} does not divide batch_size = {self.batch_size}"
      )
    rollouts = self.batch_size // self.http_reward.num_pieces * self.options.num_rollouts
    if rollouts % self.options.decode_chunks:
      raise ValueError(f"options.decode_chunks = {self.options.decode_chunks} does not divide {rollouts} rollouts")
    if EXTERNAL in self.options.reward_names and not self.http_reward.url:
      raise ValueError(
        "http_reward.url is empty: 'http' in options.reward_weights needs the address of a reward server"
      )
    if EXTERNAL not in self.options.reward_names and self.http_reward.url:
      raise ValueError("http_reward.url does nothing: add ('http', weight) to options.reward_weights, or remove it")

  def check_reference(self, beta: float) -> None:
    """Refuses a moving reference that no KL pulls toward."""
    if self.reference.interval and not beta:
      raise ValueError(
        f"reference.interval = {self.reference.interval} does nothing with objective.beta = 0: remove it"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationForUnderstandingOptions(CaptionOptions, GenerationOptions, RewardOptions):
  """Stage 2: groups of captions compete for the best reconstruction.

  Attributes:
    is_noise_shared: one initial noise for all captions of an image.
    logit_chunks: number of sequential chunks of a caption's tokens, of which one holds its logits at a time.
  """

  # One token would be the closing one, or a caption that is always cut.
  max_new_tokens: int = option(512, at_least=2)
  temperature: float = option(1.0, more_than=0)
  min_p: float = option(0.0, at_least=0, less_than=1)
  is_noise_shared: bool = True
  logit_chunks: int = option(1, at_least=1)

  def check(self) -> None:
    if self.top_k == 1:
      raise ValueError("top_k = 1: all captions of a group would be the same, so there is nothing to learn")
    TokenOptions.check(self)
    GenerationOptions.check(self)
    RewardOptions.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationForUnderstandingStage(ReinforcementStage):
  """Stage 2, Generation for Understanding: token GRPO on the captioner.

  Attributes:
    options: see `GenerationForUnderstandingOptions`.
    objective: see `TokenObjective`.
    text_rewards: options of the text rewards that `options.reward_weights` names.
  """

  trainable: str = option("^captioner/.*lora_", is_regex=True)
  options: GenerationForUnderstandingOptions = GenerationForUnderstandingOptions()
  objective: TokenObjective = TokenObjective()
  text_rewards: TextRewardOptions = TextRewardOptions()

  def check(self) -> None:
    super().check()
    self.check_reference(self.objective.beta)
    names = self.options.reward_names
    free, budget = self.text_rewards.length_free_tokens, self.options.max_new_tokens
    if "length" in names and free >= budget:
      raise ValueError(f"text_rewards.length_free_tokens = {free} leaves nothing of a budget of {budget} tokens")
    for field, reward in (
      ("length_free_tokens", "length"),
      ("repetition_ngram", "repetition"),
      ("forbidden_tokens", "format"),
    ):
      if reward not in names and not self.text_rewards.is_default(field):
        raise ValueError(f"text_rewards.{field} does nothing: options.reward_weights does not name {reward!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnderstandingForGenerationOptions(CaptionOptions, GenerationOptions, RewardOptions):
  """Stage 3: groups of images compete for the best match of one caption.

  Attributes:
    captions: "sampled" by the frozen captioner, or those of the "dataset".
    sampler: an SDE, "flow", "cps" or "dance"; nft and awm may use "ode" as well.
    noise_level: noise level a of the SDE.
    window: number of SDE steps, the same ones for the whole batch.
    window_range: the window starts in [first, last).
    window_strategy: how the start is chosen, see `samplers.sde_window`.
    window_stride: steps by which a "progressive" window moves.
    window_hold: updates after which it moves.
    is_guided_in_training: trains the guided velocity, with its gradient through both branches, as Flow-GRPO does since
      its Fast variant; its script of July 2025 detaches the unconditional branch. False trains the conditional branch
      only. Its log-probabilities are then replayed, so that the ratio starts at 1; `log_prob_difference` shows how far
      they are from the sampler's.
    is_noise_shared: one initial noise per group.
    noising_points: nft and awm: noise levels per image in the loss.
    noising_density: nft and awm: density of these levels before the shift, see `flow_matching.sample_sigmas`.
    noising_range: nft and awm: interval of (0, 1) that holds these levels before the shift.
    samples_from: policy that samples: "current", the one that learns, or "old", its slow average (DiffusionNFT).
    old_decay: nft and awm: ceiling of the slow average's decay; 0 keeps no average.
    old_decay_slope: growth of that decay per rollout.
    old_decay_start: rollouts before it grows; until then the average is a copy of the policy. DiffusionNFT's decay type
      2 has start 75, slope 0.0075 and ceiling 0.999.
    replay_chunks: number of chunks of each group whose gradients are taken one after the other, as those of the SDE
      steps always are.
  """

  num_rollouts: int = option(24, at_least=2)
  captions: str = option(SAMPLED, choices=(SAMPLED, DATASET))
  temperature: float = option(0.7, at_least=0)
  sampler: str = option("flow", choices=(ODE, *SDE_SAMPLERS))
  noise_level: float = option(0.7, more_than=0)
  window: int = option(2, at_least=1)
  window_range: tuple[int, int] = (0, 5)
  window_strategy: str = option("random", choices=WINDOW_STRATEGIES)
  window_stride: int = option(1, at_least=1)
  window_hold: int = option(1, at_least=1)
  is_guided_in_training: bool = True
  is_noise_shared: bool = True
  noising_points: int = option(4, at_least=1)
  noising_density: str = option("uniform", choices=NOISING_DENSITIES)
  noising_range: tuple[float, float] = (0.0, 1.0)
  samples_from: str = option(CURRENT, choices=(CURRENT, OLD))
  old_decay: float = option(0.0, at_least=0, less_than=1)
  old_decay_slope: float = option(1e-3, more_than=0)
  old_decay_start: int = option(0, at_least=0)
  replay_chunks: int = option(1, at_least=1)

  @property
  def window_reach(self) -> tuple[int, int]:
    """The steps [first, last) that the window stays in."""
    first, last = self.window_range
    return first, (first if self.window_strategy == "fixed" else last - 1) + self.window

  def check(self) -> None:
    TokenOptions.check(self)
    GenerationOptions.check(self)
    RewardOptions.check(self)
    if self.captions == DATASET:
      self.refuse_inert(tuple(self.token_sampling), "captions = 'dataset'")
    if self.num_rollouts % self.replay_chunks:
      raise ValueError(f"replay_chunks = {self.replay_chunks} does not divide num_rollouts = {self.num_rollouts}")
    first, last = self.window_range
    if not 0 <= first < last:
      raise ValueError(f"window_range = {self.window_range}: expected 0 <= first < last")
    low, high = self.noising_range
    if not 0 <= low < high <= 1:
      raise ValueError(f"noising_range = {self.noising_range}: expected 0 <= first < last <= 1")
    if self.sampler != ODE:
      # The last step lands on sigma = 0: it has no density.
      end = self.window_reach[1]
      if end > self.sampler_steps - 1:
        raise ValueError(
          f"window = {self.window} steps starting at {end - self.window} pass step {self.sampler_steps - 1}, the last "
          "with a density: lower window_range or raise sampler_steps"
        )
      if self.sampler == "cps" and self.noise_level > 1:
        raise ValueError(f"noise_level = {self.noise_level}: sampler = 'cps' has its largest noise at 1")
    elif self.is_noise_shared:
      raise ValueError("is_noise_shared = True: sampler = 'ode' would generate one image num_rollouts times")
    if self.window_strategy != "progressive":
      self.refuse_inert(("window_stride", "window_hold"), f"window_strategy = {self.window_strategy!r}")
    if not self.old_decay:
      self.refuse_inert(("old_decay_slope", "old_decay_start"), "old_decay = 0")
      if self.samples_from == OLD:
        raise ValueError("samples_from = 'old' needs old_decay: there is no slow average to sample from")
    texts = [name for name in self.reward_names if name in TEXT_REWARDS]
    if texts:
      raise ValueError(f"reward_weights names {texts}: all rollouts of a group have one caption in this stage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnderstandingForGenerationStage(ReinforcementStage):
  """Stage 3, Understanding for Generation: Flow-GRPO, DiffusionNFT or AWM on the decoder.

  Attributes:
    options: see `UnderstandingForGenerationOptions`.
    objective: see `ImageObjective`.
  """

  trainable: str = option("^decoder/.*lora_", is_regex=True)
  options: UnderstandingForGenerationOptions = UnderstandingForGenerationOptions()
  objective: ImageObjective = ImageObjective()

  def check(self) -> None:
    super().check()
    options, objective = self.options, self.objective
    self.check_reference(objective.beta)
    if objective.is_forward:
      if objective.average_beta and not options.old_decay:
        raise ValueError("objective.average_beta needs options.old_decay: there is no slow average to stay near")
      return
    if options.sampler == ODE:
      raise ValueError(f"options.sampler = 'ode' has no log-probabilities: loss = {objective.loss!r} needs an SDE")
    if options.old_decay:
      raise ValueError("options.old_decay is for objective.loss = 'nft' or 'awm': Flow-GRPO samples on policy")
    if options.sampler == "cps" and objective.ratio == "guard":
      raise ValueError("objective.ratio = 'guard' needs a Gaussian log-probability: sampler 'cps' drops its variance")
    for name in ("noising_points", "noising_density", "noising_range"):
      if not options.is_default(name):
        raise ValueError(f"options.{name} does nothing with objective.loss = {objective.loss!r}: remove it")

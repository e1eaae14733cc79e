"""Options of stages 2 and 3, reinforcement learning of the captioner and of the decoder."""

import dataclasses

from uae_jax.options.base import option
from uae_jax.options.objectives import ImageObjective, TokenObjective
from uae_jax.options.optimization import AdvantageOptions, ReferenceOptions, UpdateOptions
from uae_jax.options.rewards import EXTERNAL, TEXT_REWARDS, ExternalRewardOptions, TextRewardOptions
from uae_jax.options.sampling import DATASET, SAMPLED, CaptionOptions, GenerationOptions, RewardOptions, TokenOptions
from uae_jax.options.stages import AdapterStage

SDE_SAMPLERS = ("flow", "cps", "dance")
ODE = "ode"
WINDOW_STRATEGIES = ("fixed", "random", "progressive")
NOISING_DENSITIES = ("logit_normal", "mode", "uniform")
CURRENT, OLD = "current", "old"


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
    rollouts = self.batch_size // self.http_reward.num_pieces * self.options.images_per_prompt
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

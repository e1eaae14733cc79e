"""Options of the optimizer and of what an RL stage does with a rollout."""

import dataclasses

from uae_jax.options.base import Options, option

SCHEDULES = ("cosine", "constant")
ADVANTAGE_SCALES = ("group", "batch", "mean_group", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
  """AdamW with its schedule, and Muon for chosen matrices.

  Attributes:
    learning_rate: peak learning rate.
    schedule: shape after the linear warmup.
    warmup_percent: length of the linear warmup, percent of the stage's optimizer steps. Its first step has the rate
      learning_rate / (steps of the warmup); in transformers and Flow-GRPO it has rate 0 and changes nothing.
    end_factor: the cosine schedule ends at this fraction of the peak.
    b1: decay of AdamW's first moment.
    b2: decay of AdamW's second moment.
    eps: added to the square root of AdamW's second moment.
    weight_decay: decoupled weight decay.
    clip_norm: largest global gradient norm.
    spike_factor: an update whose gradient norm exceeds spike_factor times its moving average is skipped; 0 disables.
    muon: regular expression of the trainable matrices float[..., in, out] that Muon updates; "" uses AdamW for all.
      With Muon, AdamW uses Nesterov momentum for the remaining parameters.
  """

  learning_rate: float = option(1e-4, more_than=0)
  schedule: str = option("cosine", choices=SCHEDULES)
  warmup_percent: float = option(5.0, at_least=0, at_most=100)
  end_factor: float = option(0.05, at_least=0, at_most=1)
  b1: float = option(0.9, at_least=0, less_than=1)
  b2: float = option(0.99, at_least=0, less_than=1)
  eps: float = option(1e-8, more_than=0)
  weight_decay: float = option(0.0, at_least=0)
  clip_norm: float = option(1.0, more_than=0)
  spike_factor: float = option(0.0, at_least=0)
  muon: str = option("", is_regex=True)

  def check(self) -> None:
    if 0 < self.spike_factor <= 1:
      raise ValueError(f"spike_factor = {self.spike_factor}: expected 0 to disable it, or more than 1")
    if self.schedule == "constant":
      self.refuse_inert(("end_factor",), "schedule = 'constant'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageOptions(Options):
  """How rewards become advantages.

  Attributes:
    scale: divisor of the centered rewards: the std of the "group" (GRPO), of the whole "batch" (Flow-GRPO, Lite-PPO),
      "mean_group", the mean of all group stds, or "none" (Dr. GRPO).
    eps: added to the divisor.
    is_unbiased: divide the variance by n - 1 (TRL, Tunix, DanceGRPO) instead of n (Flow-GRPO).
    clip: advantages are clipped to [-clip, clip]; 0 disables. Flow-GRPO uses 5.
    aggregation: order of weighting and normalizing several rewards, see `algorithms.advantages`. A rollout that lacks
      one of several rewards has advantage 0 with "sum_then_normalize" (TRL sums the others), and the sum of the others
      with "normalize_then_sum".
  """

  scale: str = option("group", choices=ADVANTAGE_SCALES)
  eps: float = option(1e-4, at_least=0)
  is_unbiased: bool = True
  clip: float = option(0.0, at_least=0)
  aggregation: str = option("sum_then_normalize", choices=AGGREGATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceOptions(Options):
  """What the KL of an RL stage pulls toward: a fixed reference, or one that follows the policy.

  The fixed reference is the policy without its adapters and needs no memory. A moving one starts as the policy at the
  start of the stage; it is a copy of the trained parameters, kept in the checkpoints.

  Attributes:
    interval: rollouts between two updates of the reference; 0 keeps it fixed. TRL's ref_model_sync_steps, 512 there.
    alpha: at each update, reference = alpha policy + (1 - alpha) reference, parameter by parameter, so of adapters it
      is the factors that are mixed; 1 copies the policy. TRL's ref_model_mixup_alpha.
  """

  interval: int = option(0, at_least=0)
  alpha: float = option(0.6, more_than=0, at_most=1)

  def check(self) -> None:
    if not self.interval:
      self.refuse_inert(("alpha",), "interval = 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateOptions(Options):
  """How one rollout is used.

  Attributes:
    num_epochs: passes over the rollout.
    num_minibatches: optimizer steps per pass; must divide the number of prompts.
    num_microbatches: microbatches per minibatch, whose gradients are added.
  """

  num_epochs: int = option(1, at_least=1)
  num_minibatches: int = option(1, at_least=1)
  num_microbatches: int = option(1, at_least=1)

  @property
  def num_updates(self) -> int:
    """Optimizer steps per rollout."""
    return self.num_epochs * self.num_minibatches

  @property
  def is_on_policy(self) -> bool:
    """One update per rollout: the policy that sampled is the policy that learns, so every ratio is 1 by definition."""
    return self.num_updates == 1

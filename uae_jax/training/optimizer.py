"""The optimizer of every stage: AdamW under a global-norm clip. What trains is decided by the trainable/frozen
split.
"""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """AdamW and its schedule.

  Attributes:
    learning_rate: peak.
    schedule: "constant" or "cosine", after a linear warm-up.
    warmup_percent: of the stage's steps.
    end_factor: the cosine ends at this fraction of the peak.
    clip_norm: of the global gradient norm.
  """

  learning_rate: float
  schedule: str = "cosine"
  warmup_percent: float = 5.0
  end_factor: float = 0.05
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0


def learning_rate(options: OptimizerOptions, total_steps: int) -> optax.Schedule:
  """Step -> learning rate.

  Raises:
    ValueError: unknown schedule.
  """
  warmup = max(1, round(total_steps * options.warmup_percent / 100))
  if options.schedule == "cosine":
    peak, end = options.learning_rate, options.learning_rate * options.end_factor
    # Starts above zero: a first step that changes nothing is a wasted rollout.
    return optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, max(total_steps, warmup + 1), end)
  if options.schedule == "constant":
    return optax.linear_schedule(options.learning_rate / warmup, options.learning_rate, warmup)
  raise ValueError(f"optimizer.schedule = {options.schedule!r}: expected 'cosine' or 'constant'")


def make_optimizer(options: OptimizerOptions, total_steps: int) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(options.clip_norm),
    optax.adamw(
      learning_rate(options, total_steps),
      b1=options.b1,
      b2=options.b2,
      eps=options.eps,
      weight_decay=options.weight_decay,
    ),
  )

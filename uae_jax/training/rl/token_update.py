"""Token GRPO on what a token model continues its prompts with: words of a caption, or tokens of an image."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax.algorithms import grpo
from uae_jax.models.captioner import TokenModel
from uae_jax.options import ReferenceOptions, TokenObjective, UpdateOptions
from uae_jax.rollouts import captions
from uae_jax.rollouts.captions import Captions, Prefix
from uae_jax.training.rl.update import run_updates
from uae_jax.training.state import State


@dataclasses.dataclass(frozen=True, eq=False)
class TokenUpdate:
  """The update of a stage whose rollouts are groups of `Captions`.

  Attributes:
    open: (params, inputs, adapters) -> (policy, prompts as processed by it, bool[V] of tokens with a probability);
      adapters=False for the fixed reference. `inputs` is what the rollout continued: a pytree whose leaves all have the
      prompts on axis 0.
    temperature: divides the logits, as in sampling.
    num_chunks: number of chunks of the tokens, of which one holds its logits at a time.
    objective, options, optimizer, ema_decay, ema_interval, reference: settings of the stage.
  """

  open: Callable[[dict, Any, bool], tuple[TokenModel, Prefix, np.ndarray]]
  temperature: float
  num_chunks: int
  objective: TokenObjective
  options: UpdateOptions
  optimizer: optax.GradientTransformation
  ema_decay: float
  ema_interval: int
  reference: ReferenceOptions

  def _scoring(self, sampled: Captions) -> dict:
    """Arguments with which replay scores tokens as the sampler did."""
    return dict(temperature=self.temperature, kept=sampled.kept, num_chunks=self.num_chunks)

  def replay(self, params: dict, inputs: Any, sampled: Captions, *, adapters: bool = True):
    """(log_probs float32[B, R, L], entropy float32[B, R, L]) of the tokens under a policy."""
    policy, prefix, vocabulary = self.open(params, inputs, adapters)
    return captions.replay(policy, prefix, sampled.tokens, vocabulary=vocabulary, **self._scoring(sampled))

  def old_log_probs(self, params: dict, inputs: Any, sampled: Captions) -> jax.Array | None:
    """Log-probabilities of the policy that sampled, float32[B, R, L]; None when updates are on policy."""
    return None if self.options.is_on_policy else self.replay(params, inputs, sampled)[0]

  def entropy_threshold(self, params, microbatches):
    """Computes the entropy threshold over all tokens of a minibatch, before its gradient.

    The selected tokens then do not depend on how the minibatch is split into microbatches.
    """

    def entropies(microbatch):
      inputs, sampled, _, _ = microbatch
      mask = grpo.effective_mask(self.objective, sampled.mask, sampled.is_closed)
      return self.replay(params, inputs, sampled)[1], mask

    entropy, mask = jax.lax.map(entropies, microbatches)
    return grpo.entropy_threshold(entropy, mask, self.objective.top_entropy)

  def objective_of_microbatch(self, reference_params, params, microbatch, known):
    """Computes the objective; `reference_params` is None for the fixed reference, the policy without its adapters."""
    inputs, sampled, old, values = microbatch
    log_probs, entropy = self.replay(params, inputs, sampled)
    moves = reference_params is not None
    fixed_or_moving = reference_params if moves else jax.lax.stop_gradient(params)
    reference, exact_kl = None, None
    if self.objective.beta and self.objective.kl == "exact":
      *policy, vocabulary = self.open(params, inputs, True)
      *other, _ = self.open(fixed_or_moving, inputs, moves)
      exact_kl = captions.exact_kl(policy, other, sampled.tokens, vocabulary=vocabulary, **self._scoring(sampled))
    elif self.objective.beta:
      reference = self.replay(fixed_or_moving, inputs, sampled, adapters=moves)[0]
    loss, metrics = grpo.token_objective(
      self.objective,
      log_probs,
      known.old(old, log_probs),
      values,
      sampled.mask,
      reference_log_probs=reference,
      exact_kl=exact_kl,
      entropy=entropy,
      entropy_threshold_value=known.prepared,
      sampling_log_probs=sampled.log_probs,
      is_closed=sampled.is_closed,
    )
    difference = jnp.abs(jax.lax.stop_gradient(log_probs) - sampled.log_probs) * sampled.mask
    metrics["log_prob_difference"] = (jnp.sum(difference), jnp.sum(sampled.mask))
    metrics["log_prob_difference_max"] = (jnp.max(difference), jnp.float32(1))
    return (loss.sum, loss.count), metrics

  def __call__(
    self, state: State, inputs: Any, sampled: Captions, old_log_probs: jax.Array | None, values: jax.Array
  ) -> tuple[State, dict]:
    """Updates the policy.

    Args:
      state: state of the stage.
      inputs: what the rollout continued.
      sampled: groups of continuations, [prompts, rollouts, L].
      old_log_probs: see `old_log_probs`.
      values: advantages float32[prompts, rollouts].
    """
    reference = state.assemble(state.reference) if self.reference.interval else None
    return run_updates(
      state,
      (inputs, sampled, old_log_probs, values),
      lambda params, microbatch, known: self.objective_of_microbatch(reference, params, microbatch, known),
      self.options,
      self.optimizer,
      ema_decay=self.ema_decay,
      ema_interval=self.ema_interval,
      reference=self.reference,
      # With one microbatch the objective computes the threshold itself.
      prepare=self.entropy_threshold if self.objective.top_entropy < 1 and self.options.num_microbatches > 1 else None,
    )

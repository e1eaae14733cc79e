"""Stage 3, Understanding for Generation, of a model that generates images token by token: token GRPO on image tokens.

The images of a group compete for the best match of one caption.

Source: arXiv 2509.09666 section 3.3; for image tokens as a policy, T2I-R1 (arXiv 2505.00703).
"""

from collections.abc import Callable
import dataclasses
from typing import cast

import flax.struct
import jax
import numpy as np
import optax

from uae_jax.models.janus.system import JanusSystem
from uae_jax.models.uae import to_pixels, to_signed
from uae_jax.networks import Networks
from uae_jax.options import AdvantageOptions, Experiment, ReferenceOptions, TokenObjective, UpdateOptions
from uae_jax.options.image_tokens import ImageTokenOptions
from uae_jax.options.sampling import DATASET, SAMPLED
from uae_jax.rewards.ensemble import Ensemble, rewarded_embedders
from uae_jax.rollouts import captions, reconstruct
from uae_jax.rollouts.captions import Captions, Prefix
from uae_jax.rollouts.conditioning import encode_captions, encode_negative
from uae_jax.rollouts.image_tokens import ImageTokens
from uae_jax.training.build import Built
from uae_jax.training.rl.host_rewards import RewardInputs
from uae_jax.training.rl.phases import Phases
from uae_jax.training.rl.pieces import piece_key
from uae_jax.training.rl.token_update import TokenUpdate
from uae_jax.training.stages.generation_for_understanding import in_chunks
from uae_jax.training.stages.spec import StageSpec

# (params, caption tokens int32[B, L], adapters) -> (policy of image tokens, prompts as processed by it, vocabulary).
OpenImages = Callable[[dict, jax.Array, bool], tuple[ImageTokens, Prefix, np.ndarray]]


@flax.struct.dataclass
class TokenImages:
  """A rollout: groups of images as tokens.

  Made by the rollout phase; read by its reward and update phases. The first axis of every leaf is prompts.

  Attributes:
    captions: int32[prompts, L], the tokens of the captions.
    images: tokens int32[prompts, rollouts, image tokens] with sampling log-probabilities.
    old_log_probs: float32[prompts, rollouts, image tokens], replayed under the policy that sampled, or None when on
      policy.
  """

  captions: jax.Array
  images: Captions
  old_log_probs: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
  """Rollout, reward and update as pure functions of parameters, batch and key."""

  networks: Networks
  options: ImageTokenOptions
  open_images: OpenImages
  token_update: TokenUpdate
  ensemble: Ensemble

  def rollout(self, params, batch, key, step, piece=None):
    del step  # This rollout has no schedule.
    caption_key, image_key = jax.random.split(key)
    tokens = reconstruct.caption_tokens(self.networks, params, batch, piece_key(caption_key, piece), self.options)
    policy, prefix, _ = self.open_images(params, tokens, True)
    images = captions.sample_captions(
      policy,
      policy.prompts,
      prefix,
      piece_key(image_key, piece),
      num_rollouts=self.options.num_rollouts,
      max_tokens=policy.num_tokens,
      temperature=self.options.image_temperature,
      top_k=self.options.image_top_k,
      records_kept=True,
    )
    return TokenImages(tokens, images, self.token_update.old_log_probs(params, tokens, images))

  def reward(self, params, batch, groups, key):
    del key  # All randomness is in the rollout.
    model = janus(self.networks, params)
    tokens = groups.images.tokens
    reconstructions = in_chunks(
      lambda rows: reconstruct.clip(model.decode_tokens(rows)),
      tokens.reshape(-1, tokens.shape[-1]),
      self.options.decode_chunks,
    )
    measured = self.ensemble.measure(
      lambda name, x: self.networks.embed(params, name, x), to_signed(batch["image"]), reconstructions
    )
    by_prompt = to_pixels(reconstructions).reshape(*tokens.shape[:2], *reconstructions.shape[1:])
    return measured, RewardInputs(groups.captions[:, None], by_prompt)

  def update(self, state, batch, groups, values):
    del batch  # The rollout contains everything that the loss needs.
    return self.token_update(state, groups.captions, groups.images, groups.old_log_probs, values)


def janus(networks: Networks, params: dict, *, adapters: bool = True) -> JanusSystem:
  """The system of a run whose images are tokens."""
  return cast(JanusSystem, networks.uae(params, adapters=adapters))


def make_open_images(networks: Networks, guidance: float) -> OpenImages:
  """Makes the function that encodes captions and runs the prompts of their images."""

  def open_images(params: dict, tokens: jax.Array, adapters: bool):
    model = janus(networks, params, adapters=adapters)
    context, padding = encode_captions(networks.prompts, model, tokens), None
    if guidance != 1.0:
      padding = encode_negative(networks.prompts, model, context.mask.shape[1]).states
    policy = ImageTokens(model.captioner, guidance)
    prefix = policy.prefix(context.states, context.mask, padding)
    return policy, prefix, policy.prompts.vocabulary(policy.vocab_size)

  return open_images


def make_phases(
  networks: Networks,
  options: ImageTokenOptions,
  objective: TokenObjective,
  advantage: AdvantageOptions,
  update_options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  reference: ReferenceOptions | None = None,
) -> Phases:
  """Makes the four phases of the stage.

  Raises:
    ValueError: a reward names an embedder that the run does not have.
  """
  ensemble = Ensemble(options.reward_weights, options.held_out_embedder)
  ensemble.check(networks.embedders)
  reference = reference or ReferenceOptions()
  open_images = make_open_images(networks, options.guidance)
  token_update = TokenUpdate(
    open_images,
    options.image_temperature,
    options.logit_chunks,
    objective,
    update_options,
    optimizer,
    ema_decay,
    ema_interval,
    reference,
  )
  stage = _Stage(networks, options, open_images, token_update, ensemble)
  return Phases(
    stage.rollout,
    lambda *arguments: stage.reward(*arguments)[0],
    lambda rewards: ensemble.advantages(rewards, advantage),
    stage.update,
    reward_and_inputs=stage.reward,
    moves_reference=reference.interval > 0,
  )


def phases(config: Experiment, built: Built, optimizer: optax.GradientTransformation) -> Phases:
  """Makes the phases of the stage from a config."""
  section = config.image_tokens
  return make_phases(
    built.networks,
    section.options,
    section.objective,
    section.advantage,
    section.updates,
    optimizer,
    ema_decay=section.ema_decay,
    ema_interval=section.ema_interval,
    reference=section.reference,
  )


SPEC = StageSpec(
  make_phases=phases,
  embedders=rewarded_embedders,
  samples_captions=lambda options: int(options.captions == SAMPLED),
  needs_captions=lambda options: options.captions == DATASET,
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params),
  runs_suites=True,
  generates_by_captioner=True,
)

"""Stage 2, Generation for Understanding: trains the captioner by token GRPO.

The captions of a group compete for the best reconstruction of their image.

Source: arXiv 2509.09666 section 3.3; the decoder is part of the environment and stays frozen.
"""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax.models.captioner import Captioner
from uae_jax.models.uae import captioner_images, to_pixels, to_signed
from uae_jax.networks import Networks
from uae_jax.options import (
  AdvantageOptions,
  Experiment,
  GenerationForUnderstandingOptions,
  ReferenceOptions,
  TextRewardOptions,
  TokenObjective,
  UpdateOptions,
)
from uae_jax.rewards.ensemble import Ensemble, rewarded_embedders
from uae_jax.rollouts import captions, reconstruct
from uae_jax.rollouts.captions import Captions, Prefix
from uae_jax.rollouts.conditioning import Context
from uae_jax.training.build import Built
from uae_jax.training.rl.host_rewards import RewardInputs
from uae_jax.training.rl.phases import Phases
from uae_jax.training.rl.pieces import piece_key
from uae_jax.training.rl.token_update import TokenUpdate
from uae_jax.training.stages.spec import StageSpec

# (params, images uint8[B, h, w, 3], adapters) -> (captioner, prompts as processed by it, vocabulary).
OpenCaptions = Callable[[dict, jax.Array, bool], tuple[Captioner, Prefix, np.ndarray]]


@flax.struct.dataclass
class CaptionGroups:
  """A rollout of stage 2: groups of captions, with old-policy log-probabilities if updates are off policy.

  Made by the rollout phase of stage 2; read by its reward and update phases.

  Attributes:
    captions: tokens int32[prompts, rollouts, L] with masks and sampling log-probabilities.
    old_log_probs: float32[prompts, rollouts, L], replayed under the policy that sampled, or None when on policy.
    states: float[prompts, rollouts, L, D], language-model states at the caption's positions; None for conditioning
      "text".
  """

  captions: Captions
  old_log_probs: jax.Array | None
  states: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
  """Rollout, reward and update of stage 2 as pure functions of parameters, batch and key."""

  networks: Networks
  options: GenerationForUnderstandingOptions
  token_update: TokenUpdate
  ensemble: Ensemble

  def rollout(self, params, batch, key, step, piece=None):
    del step  # This rollout has no schedule.
    model = self.networks.uae(params)
    images = captioner_images(batch)
    prefix = captions.caption_prefix(model, self.networks.prompts, images)
    sampled = captions.sample_captions(
      model.captioner,
      self.networks.prompts,
      prefix,
      piece_key(key, piece),
      num_rollouts=self.options.num_rollouts,
      max_tokens=self.options.max_new_tokens,
      **self.options.token_sampling,
      records_kept=True,
    )
    old = self.token_update.old_log_probs(params, images, sampled)
    states = None
    if self.options.conditioning == "answer":
      states = captions.caption_hidden(model.captioner, prefix, sampled.tokens)[1]
    return CaptionGroups(sampled, old, states)

  def contexts(self, params, groups):
    flat = groups.captions.tokens.reshape(-1, self.options.max_new_tokens)
    if self.options.conditioning == "text":
      return reconstruct.condition(self.networks, params, None, flat, self.options)
    # The rollout has already computed the states of the captions over their shared prefix.
    states = groups.states.reshape(*flat.shape, -1)
    context = Context(self.networks.uae(params).connector(states), captions.caption_mask(flat, self.networks.prompts))
    return context, reconstruct.negative_context(self.networks, params, context, self.options)

  def reward(self, params, batch, groups, key):
    images = to_signed(batch["image"])
    num_prompts = images.shape[0]
    # A decoder of its own keeps its adapters on: it uses those that earlier stages trained.
    model = reconstruct.generator(self.networks, params, self.options)
    context, negative = self.contexts(params, groups)
    latents_shape = model.latents_shape(images)
    groups_of_noise = 1 if self.options.is_noise_shared else self.options.num_rollouts
    noise = jax.random.normal(key, (num_prompts, groups_of_noise, *latents_shape))
    noise = jnp.broadcast_to(noise, (num_prompts, self.options.num_rollouts, *latents_shape)).reshape(
      -1, *latents_shape
    )

    def generate(chunk):
      images = reconstruct.generate(
        model,
        chunk[0],
        negative,
        chunk[1],
        guidance=self.options.guidance,
        guidance_interval=self.options.guidance_interval,
        sampler_steps=self.options.sampler_steps,
        shift=self.options.shift_at(latents_shape),
      )
      return reconstruct.clip(images)

    reconstructions = in_chunks(generate, (context, noise), self.options.decode_chunks)
    sampled = groups.captions
    rewards, metrics = self.ensemble.measure(
      lambda name, x: self.networks.embed(params, name, x),
      images,
      reconstructions,
      (sampled.tokens, sampled.mask, sampled.is_closed),
    )
    reward_inputs = RewardInputs(sampled.tokens, to_pixels(reconstructions).reshape(num_prompts, -1, *images.shape[1:]))
    return (rewards, metrics | caption_metrics(sampled)), reward_inputs

  def update(self, state, batch, groups, values):
    return self.token_update(state, captioner_images(batch), groups.captions, groups.old_log_probs, values)


def make_open_captions(networks: Networks) -> OpenCaptions:
  """Makes the function that runs the prompts of captions."""

  def open_captions(params: dict, images: jax.Array, adapters: bool):
    model = networks.uae(params, adapters=adapters)
    prefix = captions.caption_prefix(model, networks.prompts, images)
    return model.captioner, prefix, networks.prompts.vocabulary(model.captioner.vocab_size)

  return open_captions


def make_phases(
  networks: Networks,
  options: GenerationForUnderstandingOptions,
  objective: TokenObjective,
  advantage: AdvantageOptions,
  update_options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  reference: ReferenceOptions | None = None,
  text_rewards: TextRewardOptions | None = None,
) -> Phases:
  """Makes the four phases of stage 2.

  Raises:
    ValueError: a reward names an embedder that the run does not have.
  """
  ensemble = Ensemble(options.reward_weights, options.held_out_embedder, text_rewards or TextRewardOptions())
  ensemble.check(networks.embedders)
  reference = reference or ReferenceOptions()
  token_update = TokenUpdate(
    make_open_captions(networks),
    options.temperature,
    options.logit_chunks,
    objective,
    update_options,
    optimizer,
    ema_decay,
    ema_interval,
    reference,
  )
  stage = _Stage(networks, options, token_update, ensemble)
  return Phases(
    stage.rollout,
    lambda *arguments: stage.reward(*arguments)[0],
    lambda rewards: ensemble.advantages(rewards, advantage),
    stage.update,
    reward_and_inputs=stage.reward,
    moves_reference=reference.interval > 0,
  )


def in_chunks(function, inputs, num_chunks: int):
  """Applies `function` to `num_chunks` chunks of the leading axis, one after the other.

  Raises:
    ValueError: the leading axis is not divisible.
  """
  if num_chunks == 1:
    return function(inputs)
  rows = jax.tree.leaves(inputs)[0].shape[0]
  if rows % num_chunks:
    raise ValueError(f"decode_chunks = {num_chunks} does not divide {rows} reconstructions")
  # Chunk i takes rows i, i + n, ...: with rows sharded in blocks, each device keeps its own rows.
  chunks = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_chunks, *x.shape[1:]), 0, 1), inputs)
  outputs = jax.lax.map(function, chunks)
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), outputs)


def caption_metrics(sampled: Captions) -> dict:
  """Computes length (without the closing token), truncated fraction, and number of distinct captions per group."""
  lengths = (jnp.sum(sampled.mask, axis=-1) - sampled.is_closed).astype(jnp.float32)
  is_equal = jnp.all(sampled.tokens[:, :, None] == sampled.tokens[:, None, :], axis=-1)
  num_rollouts = is_equal.shape[-1]
  # A caption is counted where no earlier one of its group equals it.
  is_first = ~jnp.any(is_equal & (jnp.arange(num_rollouts)[:, None] > jnp.arange(num_rollouts)[None, :]), axis=-1)
  return {
    "caption_length": jnp.mean(lengths),
    "caption_length_min": jnp.min(lengths),
    "caption_length_max": jnp.max(lengths),
    "truncated_fraction": jnp.mean(1.0 - sampled.is_closed),
    "distinct_captions": jnp.mean(jnp.sum(is_first, axis=-1).astype(jnp.float32)),
  }


def phases(config: Experiment, built: Built, optimizer: optax.GradientTransformation) -> Phases:
  """Makes the phases of stage 2 from a config."""
  section = config.generation_for_understanding
  text = section.text_rewards
  if not text.forbidden_tokens:
    text = dataclasses.replace(text, forbidden_tokens=built.processor.control_ids)
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
    text_rewards=text,
  )


SPEC = StageSpec(
  make_phases=phases,
  embedders=rewarded_embedders,
  observes_captions=True,
  samples_captions=lambda options: options.num_rollouts,
  needs_captions=lambda options: False,
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params),
  runs_suites=True,
)

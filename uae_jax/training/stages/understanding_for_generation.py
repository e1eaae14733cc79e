"""Stage 3, Understanding for Generation: trains the decoder by Flow-GRPO, DiffusionNFT or AWM.

The images of a group compete for the best match of one caption.

Source: arXiv 2509.09666 section 3.3; Flow-GRPO (arXiv 2505.05470); the captioner is frozen.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax.models.uae import captioner_images, to_pixels, to_signed
from uae_jax.networks import Networks
from uae_jax.options import (
  AdvantageOptions,
  Experiment,
  ImageObjective,
  ReferenceOptions,
  UnderstandingForGenerationOptions,
  UpdateOptions,
)
from uae_jax.options.reinforcement import CURRENT, OLD
from uae_jax.options.sampling import DATASET, SAMPLED
from uae_jax.rewards.ensemble import Ensemble, rewarded_embedders
from uae_jax.rollouts import reconstruct
from uae_jax.rollouts.conditioning import Context
from uae_jax.rollouts.images import velocity_field
from uae_jax.training.build import Built
from uae_jax.training.rl import forward_policy, pieces, sde_policy
from uae_jax.training.rl.host_rewards import RewardInputs
from uae_jax.training.rl.phases import OldPolicy, Phases
from uae_jax.training.rl.pieces import piece_key
from uae_jax.training.rl.policy import Fields, ImagePolicy, by_prompt, flat
from uae_jax.training.rl.update import run_updates
from uae_jax.training.stages.generation_for_understanding import in_chunks
from uae_jax.training.stages.spec import StageSpec


def old_policy(options: UnderstandingForGenerationOptions) -> OldPolicy | None:
  """Makes the update rule of the slow average of the policy; None if the stage keeps no average."""
  if not options.old_decay:
    return None
  return OldPolicy(
    options.old_decay, options.old_decay_slope, options.old_decay_start, samples=options.samples_from == OLD
  )


@flax.struct.dataclass
class ImageGroups:
  """A rollout of stage 3: groups of images, and the record that the loss reads.

  Made by the rollout phase of stage 3; read by its reward and update phases. The first axis of every leaf except those
  of `negative` is prompts, so that minibatches are split between groups.

  Attributes:
    tokens: int32[prompts, L], captions.
    context: conditioning of the captions, prompts rows.
    negative: conditioning of the negative prompt in one row, or None without guidance.
    final: float32[prompts, rollouts, h, w, 16], finished latents.
    record: what the loss needs of the rollout, a `sde_policy.Steps` or `forward_policy.Noised`.
  """

  tokens: jax.Array
  context: Context
  negative: Context | None
  final: jax.Array
  record: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
  """Rollout, reward and update of stage 3 as pure functions of parameters, batch and key."""

  networks: Networks
  options: UnderstandingForGenerationOptions
  update_options: UpdateOptions
  optimizer: optax.GradientTransformation
  ema_decay: float
  ema_interval: int
  reference: ReferenceOptions
  ensemble: Ensemble
  policy: ImagePolicy
  is_on_policy: bool
  training_guidance: float

  def field(self, params, context, negative, *, repeat=None, guidance=None, adapters=True):
    """Makes the velocity field of a policy.

    Args:
      params: parameters of the policy.
      context: conditioning of the captions, one row per prompt.
      negative: conditioning of the negative prompt, or None without guidance.
      repeat: consecutive rows per prompt; None for `num_rollouts`.
      guidance: classifier-free guidance; None for the guidance of training.
      adapters: False gives the fixed reference policy.
    """
    repeat = self.options.num_rollouts if repeat is None else repeat
    guidance = self.training_guidance if guidance is None else guidance
    model = self.networks.uae(params, adapters=adapters)
    interval = self.options.guidance_interval
    return velocity_field(model, context.repeat(repeat), guidance=guidance, negative=negative, interval=interval)

  def rollout(self, params, batch, key, step, piece=None):
    caption_key, noise_key, sample_key = jax.random.split(key, 3)
    tokens = reconstruct.caption_tokens(self.networks, params, batch, piece_key(caption_key, piece), self.options)
    model = self.networks.uae(params)
    context, negative = reconstruct.condition(self.networks, params, captioner_images(batch), tokens, self.options)
    images = to_signed(batch["image"])
    rows = images.shape[0] * (1 if self.options.is_noise_shared else self.options.num_rollouts)
    final, record = self.policy.sample(
      lambda repeat: self.field(params, context, negative, repeat=repeat, guidance=self.options.guidance),
      jax.random.normal(piece_key(noise_key, piece), (rows, *model.latents_shape(images))),
      sample_key,
      step,
      piece,
    )
    if not self.is_on_policy:
      record = self.policy.record_old_policy(self.field(params, context, negative), record)
    return ImageGroups(tokens, context, negative, final, record)

  def reward(self, params, batch, groups, key):
    del key  # All randomness is in the rollout.
    model = self.networks.uae(params)
    reconstructions = in_chunks(
      lambda x: jnp.clip(model.decode_latents(x), -1.0, 1.0), flat(groups.final, 0), self.options.decode_chunks
    )
    measured = self.ensemble.measure(
      lambda name, x: self.networks.embed(params, name, x), to_signed(batch["image"]), reconstructions
    )
    return measured, RewardInputs(
      groups.tokens[:, None], by_prompt(to_pixels(reconstructions), 0, self.options.num_rollouts)
    )

  def update(self, state, batch, groups, values):
    del batch  # The rollout contains everything that the loss needs.
    record = groups.record
    if self.policy.record_average_policy is not None:
      record = self.policy.record_average_policy(
        self.field(state.assemble(state.old), groups.context, groups.negative), record
      )

    moves = self.reference.interval > 0
    reference_params = state.assemble(state.reference) if moves else None

    def objective_of_part(params, microbatch, known):
      context, record, values = microbatch
      repeat = self.options.num_rollouts // self.options.replay_chunks
      point, chunk = known.part // self.options.replay_chunks, known.part % self.options.replay_chunks

      def cut(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, chunk * repeat, repeat, axis)

      # Leaves have their rollouts on axis 2; leaves of two axes have no rollouts.
      record = jax.tree.map(lambda x: cut(x, 2) if x.ndim > 2 else x, record)
      reference = reference_params if moves else jax.lax.stop_gradient(params)
      fields = Fields(
        self.field(params, context, groups.negative, repeat=repeat),
        lambda: self.field(reference, context, groups.negative, repeat=repeat, adapters=moves),
      )
      # If the slow average sampled, old and current policy differ even at the first update.
      old = known.old if self.options.samples_from == CURRENT else lambda stored, _: stored
      return self.policy.loss(fields, record, point, cut(values, 1), old)

    return run_updates(
      state,
      (groups.context, record, values),
      objective_of_part,
      self.update_options,
      self.optimizer,
      ema_decay=self.ema_decay,
      ema_interval=self.ema_interval,
      reference=self.reference,
      old_policy=old_policy(self.options),
      num_parts=self.policy.num_points * self.options.replay_chunks,
    )


def join(groups: Sequence[ImageGroups]) -> ImageGroups:
  """Joins the pieces of a rollout; the conditioning of the negative prompt, which has no prompts, is that of each."""
  joined = pieces.join([dataclasses.replace(piece, negative=None) for piece in groups])
  return dataclasses.replace(joined, negative=groups[0].negative)


def make_phases(
  networks: Networks,
  options: UnderstandingForGenerationOptions,
  objective: ImageObjective,
  advantage: AdvantageOptions,
  update_options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  reference: ReferenceOptions | None = None,
) -> Phases:
  """Makes the four phases of stage 3.

  Raises:
    ValueError: a reward names an embedder that the run does not have.
  """
  ensemble = Ensemble(options.reward_weights, options.held_out_embedder)
  ensemble.check(networks.embedders)
  make_policy = (forward_policy if objective.is_forward else sde_policy).make_policy
  policy = make_policy(options, objective)
  is_on_policy = update_options.is_on_policy and options.samples_from == CURRENT
  training_guidance = options.guidance if options.is_guided_in_training else 1.0
  reference = reference or ReferenceOptions()
  stage = _Stage(
    networks,
    options,
    update_options,
    optimizer,
    ema_decay,
    ema_interval,
    reference,
    ensemble,
    policy,
    is_on_policy,
    training_guidance,
  )
  return Phases(
    stage.rollout,
    lambda *arguments: stage.reward(*arguments)[0],
    lambda rewards: ensemble.advantages(rewards, advantage),
    stage.update,
    reward_and_inputs=stage.reward,
    old_policy=old_policy(options),
    moves_reference=reference.interval > 0,
    join=join,
  )


def phases(config: Experiment, built: Built, optimizer: optax.GradientTransformation) -> Phases:
  """Makes the phases of stage 3 from a config."""
  section = config.understanding_for_generation
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
  generates_by_captioner=False,
  make_phases=phases,
  embedders=rewarded_embedders,
  # The captioner is frozen, so the gain can be measured per image, from the same captions.
  compares_before=True,
  samples_captions=lambda options: int(options.captions == SAMPLED),
  needs_captions=lambda options: options.captions == DATASET,
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params, before),
  runs_suites=True,
)

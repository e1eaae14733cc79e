"""Stage 3: Understanding for Generation. Groups of images compete for one caption; Flow-GRPO, DiffusionNFT or AWM moves
the decoder.

Source: arXiv 2509.09666 section 3.3; Flow-GRPO (arXiv 2505.05470); the captioner is frozen.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax.algorithms.advantages import AdvantageOptions
from uae_jax.algorithms.flow_grpo import FlowObjective
from uae_jax.algorithms.forward_process import ForwardObjective
from uae_jax.models.uae import captioner_images, to_pixels, to_signed
from uae_jax.networks import Networks
from uae_jax.rewards.ensemble import Ensemble
from uae_jax.rollouts import reconstruct
from uae_jax.rollouts.conditioning import Context
from uae_jax.rollouts.images import velocity_field
from uae_jax.training.rl import forward_policy, sde_policy
from uae_jax.training.rl.phases import OldPolicy, Phases, RewardInputs
from uae_jax.training.rl.policy import Fields, ImagePolicy, by_prompt, flat
from uae_jax.training.rl.update import UpdateOptions, run_updates
from uae_jax.training.stages.generation_for_understanding import in_chunks

OLD, CURRENT = "old", "current"


@dataclasses.dataclass(frozen=True)
class UnderstandingForGenerationOptions:
  """
  Attributes:
    num_rollouts: images a caption (the group).
    captions: "sampled" by the frozen captioner, or "dataset".
    max_new_tokens: caption budget of sampled captions.
    temperature: of sampled captions.
    conditioning: "text" re-encodes the caption as a generation prompt; "answer" uses the connector's states at the
      caption's own positions.
    text_tower: language model that re-encodes captions: "reference" (adapters off) or "policy".
    sampler: "flow", "cps" or "dance", the SDEs of Flow-GRPO; DiffusionNFT and AWM may use "ode" as well.
    sampler_steps: N of the schedule.
    noise_level: a of the SDE.
    shift: of the schedule, and of the noise levels at which DiffusionNFT and AWM look.
    window: number of SDE steps, the same ones for the whole batch.
    window_range: the window starts in [first, last).
    window_strategy: "fixed", "random" or "progressive", see `samplers.sde_window`.
    window_stride: steps that a "progressive" window moves.
    window_hold: updates before it moves.
    guidance: of the sampler.
    is_guided_in_training: False trains the conditional branch alone. Its log-probabilities are then replayed, so that
      the ratio starts at 1; `log_prob_difference` shows how far they are from the sampler's.
    is_noise_shared: one initial noise a group.
    noising_points: noise levels an image at which DiffusionNFT and AWM look.
    noising_density: of these levels before the shift, see `flow_matching.sample_sigmas`.
    noising_range: part of (0, 1) in which they lie before the shift.
    samples_from: "current", the policy that learns, or "old", its slow average: DiffusionNFT's off-policy form.
    old_decay: ceiling of the slow average's decay, for DiffusionNFT and AWM; 0 keeps no average.
    old_decay_slope: the decay grows by so much a rollout.
    reward_weights: (name, weight) of embedders and "http", see `rewards.ensemble`.
    held_out_embedder: measured, never rewarded; "" for none.
    decode_chunks: images are decoded in so many pieces.
    replay_chunks: pieces of each group whose gradients are taken one after the other, as those of the window's steps
      always are.
  """

  num_rollouts: int = 24
  captions: str = "sampled"
  max_new_tokens: int = 512
  temperature: float = 0.7
  conditioning: str = "text"
  text_tower: str = "reference"
  sampler: str = "flow"
  sampler_steps: int = 10
  noise_level: float = 0.7
  shift: float = 3.0
  window: int = 2
  window_range: tuple[int, int] = (0, 5)
  window_strategy: str = "random"
  window_stride: int = 1
  window_hold: int = 1
  guidance: float = 1.0
  is_guided_in_training: bool = True
  is_noise_shared: bool = True
  noising_points: int = 4
  noising_density: str = "uniform"
  noising_range: tuple[float, float] = (0.0, 1.0)
  samples_from: str = CURRENT
  old_decay: float = 0.0
  old_decay_slope: float = 1e-3
  reward_weights: tuple[tuple[str, float], ...] = (("clip", 1.0),)
  held_out_embedder: str = ""
  decode_chunks: int = 1
  replay_chunks: int = 1

  @property
  def old_policy(self) -> OldPolicy | None:
    """How the slow average follows, or None without one."""
    if not self.old_decay:
      return None
    return OldPolicy(self.old_decay, self.old_decay_slope, samples=self.samples_from == OLD)


@flax.struct.dataclass
class ImageGroups:
  """A rollout. Leaves lead with the prompts axis, so that minibatches cut between groups.

  Attributes:
    tokens: int32[prompts, L], the captions.
    context: of the captions, [prompts, T, C].
    negative: one row, or None without guidance.
    final: float32[prompts, rollouts, h, w, 16].
    kept: what the loss looks at, see `sde_policy.Steps` and `forward_policy.Noised`.
  """

  tokens: jax.Array
  context: Context
  negative: Context | None
  final: jax.Array
  kept: Any


def check(options: UnderstandingForGenerationOptions, objective: FlowObjective | ForwardObjective) -> None:
  """
  Raises:
    ValueError: an unknown option, or options that contradict each other.
  """
  reconstruct.check_options(options)
  for name, allowed in (
    ("captions", ("sampled", "dataset")),
    ("samples_from", (CURRENT, OLD)),
  ):
    value = getattr(options, name)
    if value not in allowed:
      raise ValueError(f"{name} = {value!r}: expected {' or '.join(map(repr, allowed))}")
  is_forward = isinstance(objective, ForwardObjective)
  if options.replay_chunks < 1 or options.num_rollouts % options.replay_chunks:
    raise ValueError(f"replay_chunks = {options.replay_chunks} does not divide num_rollouts = {options.num_rollouts}")
  if not 0 <= options.old_decay < 1:
    raise ValueError(f"old_decay = {options.old_decay}: expected 0 or more, and less than 1")
  if options.old_decay and not is_forward:
    raise ValueError("old_decay is for objective.loss = 'nft' or 'awm': Flow-GRPO samples from the policy that learns")
  if not options.old_decay and options.samples_from == OLD:
    raise ValueError("samples_from = 'old' needs old_decay: there is no slow average to sample from")
  if not options.old_decay and is_forward and objective.average_beta:
    raise ValueError("objective.average_beta needs old_decay: there is no slow average to stay near")


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
  """Rollout, reward and update of stage 3 as pure functions of parameters, batch and key."""

  networks: Networks
  options: UnderstandingForGenerationOptions
  update_options: UpdateOptions
  optimizer: optax.GradientTransformation
  ema_decay: float
  ensemble: Ensemble
  policy: ImagePolicy
  is_on_policy: bool
  training_guidance: float

  def field(self, params, context, negative, *, repeat=None, guidance=None, adapters=True):
    """The velocity field of a policy; by default over all rollouts of a group and with the guidance of training."""
    repeat = self.options.num_rollouts if repeat is None else repeat
    guidance = self.training_guidance if guidance is None else guidance
    model = self.networks.uae(params, adapters=adapters)
    return velocity_field(model, context.repeat(repeat), guidance=guidance, negative=negative)

  def caption_tokens(self, params, batch, key):
    if self.options.captions == "dataset":
      return batch["tokens"]
    model = self.networks.uae(params)
    sizes = dict(max_new_tokens=self.options.max_new_tokens, temperature=self.options.temperature)
    return reconstruct.caption(model, self.networks.prompts, captioner_images(batch), key, **sizes).tokens[:, 0]

  def rollout(self, params, batch, key, step):
    caption_key, noise_key, sample_key = jax.random.split(key, 3)
    tokens = self.caption_tokens(params, batch, caption_key)
    model = self.networks.uae(params)
    context, negative = reconstruct.condition(self.networks, params, captioner_images(batch), tokens, self.options)
    images = to_signed(batch["image"])
    rows = images.shape[0] * (1 if self.options.is_noise_shared else self.options.num_rollouts)
    final, kept = self.policy.sample(
      lambda repeat: self.field(params, context, negative, repeat=repeat, guidance=self.options.guidance),
      jax.random.normal(noise_key, (rows, *model.latents_shape(images))),
      sample_key,
      step,
    )
    if not self.is_on_policy:
      kept = self.policy.record_old_policy(self.field(params, context, negative), kept)
    return ImageGroups(tokens, context, negative, final, kept)

  def reward(self, params, batch, groups, key):
    del key  # Everything random happened in the rollout.
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
    del batch  # The rollout holds all that the loss needs.
    kept = groups.kept
    if self.policy.record_average_policy is not None:
      kept = self.policy.record_average_policy(
        self.field(state.assemble(state.old), groups.context, groups.negative), kept
      )

    def objective_of_part(params, piece, known):
      context, kept, values = piece
      repeat = self.options.num_rollouts // self.options.replay_chunks
      point, chunk = known.part // self.options.replay_chunks, known.part % self.options.replay_chunks

      def cut(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, chunk * repeat, repeat, axis)

      # Leaves have their rollouts on axis 2, or two axes and none.
      kept = jax.tree.map(lambda x: cut(x, 2) if x.ndim > 2 else x, kept)
      fields = Fields(
        self.field(params, context, groups.negative, repeat=repeat),
        lambda: self.field(jax.lax.stop_gradient(params), context, groups.negative, repeat=repeat, adapters=False),
      )
      # The slow average is another policy than the one that learns, at the first update too.
      old = known.old if self.options.samples_from == CURRENT else lambda stored, _: stored
      return self.policy.loss(fields, kept, point, cut(values, 1), old)

    return run_updates(
      state,
      (groups.context, kept, values),
      objective_of_part,
      self.update_options,
      self.optimizer,
      ema_decay=self.ema_decay,
      old_policy=self.options.old_policy,
      num_parts=self.policy.num_points * self.options.replay_chunks,
    )


def make_phases(
  networks: Networks,
  options: UnderstandingForGenerationOptions,
  objective: FlowObjective | ForwardObjective,
  advantage: AdvantageOptions,
  update_options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
) -> Phases:
  """The four phases of stage 3.

  Raises:
    ValueError: an unknown option, or options that contradict each other.
  """
  check(options, objective)
  ensemble = Ensemble(options.reward_weights, options.held_out_embedder)
  ensemble.check(networks.embedders)
  if ensemble.texts:
    raise ValueError(f"reward_weights names {ensemble.texts}: all rollouts of a group have one caption in this stage")
  make_policy = (forward_policy if isinstance(objective, ForwardObjective) else sde_policy).make_policy
  policy = make_policy(options, objective)
  is_on_policy = update_options.is_on_policy and options.samples_from == CURRENT
  training_guidance = options.guidance if options.is_guided_in_training else 1.0
  stage = _Stage(
    networks, options, update_options, optimizer, ema_decay, ensemble, policy, is_on_policy, training_guidance
  )
  return Phases(
    stage.rollout,
    lambda *arguments: stage.reward(*arguments)[0],
    lambda rewards: ensemble.advantages(rewards, advantage),
    stage.update,
    reward_and_inputs=stage.reward,
    old_policy=options.old_policy,
  )

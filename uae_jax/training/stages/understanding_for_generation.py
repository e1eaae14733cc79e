"""Stage 3: Understanding for Generation. Groups of images compete for one caption; Flow-GRPO moves the decoder.

Source: arXiv 2509.09666 section 3.3; Flow-GRPO (arXiv 2505.05470); the captioner is frozen.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax.algorithms import advantages as advantage_functions
from uae_jax.algorithms import flow_grpo, samplers
from uae_jax.models.uae import captioner_images, to_signed
from uae_jax.networks import Networks
from uae_jax.rewards.embedding import cosine_rewards, weighted_sum
from uae_jax.rollouts import captions
from uae_jax.rollouts.contexts import Context, encode_captions, encode_negative
from uae_jax.rollouts.images import Trajectories, replay, sample_sde, velocity_field
from uae_jax.training import reinforcement
from uae_jax.training.reinforcement import Phases, UpdateOptions
from uae_jax.training.stages.generation_for_understanding import in_chunks, reward_metrics


@dataclasses.dataclass(frozen=True)
class UnderstandingForGenerationOptions:
  """
  Attributes:
    num_rollouts: images a caption (the group).
    captions: "sampled" by the frozen captioner, or "dataset".
    max_new_tokens: caption budget of sampled captions.
    temperature: of sampled captions.
    text_tower: "reference" (adapters off) or "policy".
    sampler: "flow", "cps" or "dance".
    sampler_steps: N of the schedule.
    noise_level: a of the sampler.
    shift: of the schedule.
    window: number of SDE steps, the same ones for the whole batch.
    window_range: the window starts in [first, last).
    window_strategy: "random" or "progressive", see `samplers.sde_window`.
    guidance: in rollout and training.
    is_noise_shared: one initial noise a group.
    reward_weights: encoder -> weight.
    held_out_encoder: measured, never rewarded; "" for none.
    decode_chunks: images are decoded in so many pieces.
  """

  num_rollouts: int = 24
  captions: str = "sampled"
  max_new_tokens: int = 512
  temperature: float = 0.7
  text_tower: str = "reference"
  sampler: str = "flow"
  sampler_steps: int = 10
  noise_level: float = 0.7
  shift: float = 3.0
  window: int = 2
  window_range: tuple[int, int] = (0, 5)
  window_strategy: str = "random"
  guidance: float = 1.0
  is_noise_shared: bool = True
  reward_weights: tuple[tuple[str, float], ...] = (("clip", 1.0),)
  held_out_encoder: str = ""
  decode_chunks: int = 1


@flax.struct.dataclass
class ImageGroups:
  """A rollout. Leaves lead with the prompts axis, so that minibatches cut between groups.

  Attributes:
    context: of the captions, [prompts, T, C].
    negative: one row, or None without guidance.
    latents: float32[prompts, W + 1, rollouts, h, w, 16].
    steps: int32[W].
    log_probs: float32[prompts, W, rollouts]; as measured while sampling.
    old_log_probs: the same by replay, or None when on policy.
    old_mean: float32[prompts, W, rollouts, h, w, 16] of the policy that sampled, or None when on policy.
    final: float32[prompts, rollouts, h, w, 16].
  """

  context: Context
  negative: Context | None
  latents: jax.Array
  steps: jax.Array
  log_probs: jax.Array
  old_log_probs: jax.Array | None
  old_mean: jax.Array | None
  final: jax.Array


def make_phases(
  networks: Networks,
  options: UnderstandingForGenerationOptions,
  objective: flow_grpo.FlowObjective,
  advantage: advantage_functions.AdvantageOptions,
  update_options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
) -> Phases:
  """The four phases of stage 3.

  Raises:
    ValueError: an unknown option, or a window that does not fit the schedule.
  """
  if options.captions not in ("sampled", "dataset"):
    raise ValueError(f"captions = {options.captions!r}: expected 'sampled' or 'dataset'")
  if options.text_tower not in ("reference", "policy"):
    raise ValueError(f"text_tower = {options.text_tower!r}: expected 'reference' or 'policy'")
  # The last step lands on sigma = 0: it has no density.
  if options.window_range[1] - 1 + options.window > options.sampler_steps - 1:
    raise ValueError(
      f"window of {options.window} steps starting before {options.window_range[1]} passes step "
      f"{options.sampler_steps - 1}, the last with a density: lower window_range or raise sampler_steps"
    )
  if options.sampler == "cps" and objective.ratio == "guard":
    raise ValueError("objective.ratio = 'guard' needs a Gaussian log-probability: sampler 'cps' drops its variance")
  prompts = networks.prompts
  schedule = dict(num_steps=options.sampler_steps, shift=options.shift)
  sde = dict(kind=options.sampler, noise_level=options.noise_level)

  def by_prompt(x, axis):
    """[..., prompts * rollouts, ...] at `axis` -> [prompts, ..., rollouts, ...]."""
    x = x.reshape(*x.shape[:axis], -1, options.num_rollouts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  def flat(x, axis):
    """The inverse of `by_prompt`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def field(model, context, negative, repeat):
    return velocity_field(model, context.repeat(repeat), guidance=options.guidance, negative=negative)

  def replay_groups(model, context, negative, latents, steps):
    """(log_probs [prompts, W, rollouts], mean [prompts, W, rollouts, h, w, 16], std [W])."""
    kept = Trajectories(latents=flat(latents, 1), steps=steps, log_probs=None, final=None)
    velocity = field(model, context, negative, options.num_rollouts)
    log_probs, mean, std = replay(velocity, kept, **schedule, **sde)
    return by_prompt(log_probs, 1), by_prompt(mean, 1), std

  def rollout(params, batch, key, step):
    caption_key, noise_key, window_key, sde_key = jax.random.split(key, 4)
    model = networks.uae(params)
    tokens = batch["tokens"]
    if options.captions == "sampled":
      tokens = captions.sample_captions(
        model.captioner.language,
        prompts,
        captions.caption_prefix(model, prompts, captioner_images(batch)),
        caption_key,
        num_rollouts=1,
        max_tokens=options.max_new_tokens,
        temperature=options.temperature,
      ).tokens[:, 0]
    tower = networks.uae(params, adapters=options.text_tower == "policy")
    context = encode_captions(prompts, tower, tokens)
    negative = None
    if options.guidance != 1.0:
      negative = encode_negative(prompts, tower, context.mask.shape[1])
    images = to_signed(batch["image"])
    latents_shape = model.latents_shape(images)
    rows = images.shape[0] * (1 if options.is_noise_shared else options.num_rollouts)
    sampled = sample_sde(
      lambda repeat: field(model, context, negative, repeat),
      jax.random.normal(noise_key, (rows, *latents_shape)),
      sde_key,
      samplers.sde_window(
        step if options.window_strategy == "progressive" else window_key, options.window_range, options.window_strategy
      ),
      num_rollouts=options.num_rollouts,
      is_noise_shared=options.is_noise_shared,
      window=options.window,
      **schedule,
      **sde,
    )
    latents = by_prompt(sampled.latents, 1)
    old_log_probs = old_mean = None
    if not update_options.is_on_policy:
      old_log_probs, old_mean, _ = replay_groups(model, context, negative, latents, sampled.steps)
    return ImageGroups(
      context=context,
      negative=negative,
      latents=latents,
      steps=sampled.steps,
      log_probs=by_prompt(sampled.log_probs, 1),
      old_log_probs=old_log_probs,
      old_mean=old_mean,
      final=by_prompt(sampled.final, 0),
    )

  def reward(params, batch, groups, key):
    del key  # Everything random happened in the rollout.
    model = networks.uae(params)
    painted = in_chunks(
      lambda x: jnp.clip(model.decode_latents(x), -1.0, 1.0), flat(groups.final, 0), options.decode_chunks
    )
    names = tuple(name for name, _ in options.reward_weights)
    held_out = (options.held_out_encoder,) if options.held_out_encoder else ()
    similarities = cosine_rewards(
      lambda name, x: networks.embed(params, name, x), names + held_out, to_signed(batch["image"]), painted
    )
    rewards = {name: similarities[name] for name in names}
    metrics = {f"reward_{name}": jnp.mean(value) for name, value in rewards.items()}
    for name in held_out:
      metrics["held_out_reward"] = jnp.mean(similarities[name])
    return rewards, metrics

  def advantages(rewards):
    weights = dict(options.reward_weights)
    values = advantage_functions.multi_reward_advantages(rewards, weights, advantage)
    return values, reward_metrics(weighted_sum(rewards, weights))

  def make_objective(steps, negative):
    def objective_of_piece(params, piece):
      context, latents, sampled_log_probs, old_log_probs, old_mean, values = piece
      log_probs, mean, std = replay_groups(networks.uae(params), context, negative, latents, steps)
      reference_mean = None
      if objective.beta:
        reference = networks.uae(params, adapters=False)
        reference_mean = jax.lax.stop_gradient(replay_groups(reference, context, negative, latents, steps)[1])
      if old_log_probs is None:
        old_log_probs, old_mean = jax.lax.stop_gradient((log_probs, mean))
      sigmas = samplers.sigmas(options.sampler_steps, options.shift)
      at = (jnp.asarray(sigmas)[steps], jnp.asarray(sigmas)[steps + 1])
      loss, metrics = flow_grpo.flow_objective(
        objective,
        log_probs=jnp.swapaxes(log_probs, 0, 1),
        old_log_probs=jnp.swapaxes(old_log_probs, 0, 1),
        advantages=values,
        mean=jnp.swapaxes(mean, 0, 1),
        old_mean=jnp.swapaxes(old_mean, 0, 1),
        reference_mean=None if reference_mean is None else jnp.swapaxes(reference_mean, 0, 1),
        std=std,
        sigma=at[0],
        sigma_next=at[1],
        velocity_scale=samplers.velocity_scale(options.sampler, *at, sigmas[1], options.noise_level),
        mean_std=samplers.mean_std(options.sampler, sigmas, options.noise_level),
      )
      difference = jnp.abs(jax.lax.stop_gradient(log_probs) - sampled_log_probs)
      metrics["log_prob_difference"] = (jnp.sum(difference), jnp.float32(difference.size))
      return (loss.sum, loss.count), metrics

    return objective_of_piece

  def update(state, batch, groups, values):
    del batch  # The rollout holds all that replay needs.
    pieces = (groups.context, groups.latents, groups.log_probs, groups.old_log_probs, groups.old_mean, values)
    return reinforcement.update(
      state, pieces, make_objective(groups.steps, groups.negative), update_options, optimizer, ema_decay=ema_decay
    )

  return Phases(rollout, reward, advantages, update)

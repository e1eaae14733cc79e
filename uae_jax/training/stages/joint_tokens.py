"""Stages 2 and 3 in one step, of a model that generates images token by token.

One tree of rollouts trains both directions: several captions per image, several images per caption. A caption is as
good as its images on average, compared with the other captions of its image; an image is compared with the others of
its caption. The gradients of both objectives are added, and the shared adapters updated once.

Both directions have the policy itself as environment: captions are rewarded by images that the same weights generate.

Source: arXiv 2509.09666 section 3.3, both equations at once.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax.models.uae import captioner_images, to_pixels, to_signed
from uae_jax.networks import Networks
from uae_jax.options import AdvantageOptions, Experiment, ReferenceOptions, TokenObjective, UpdateOptions
from uae_jax.options.image_tokens import JointTokenOptions
from uae_jax.rewards.ensemble import Ensemble, rewarded_embedders
from uae_jax.rollouts import captions, reconstruct
from uae_jax.rollouts.captions import Captions
from uae_jax.training.build import Built
from uae_jax.training.rl.host_rewards import RewardInputs
from uae_jax.training.rl.phases import Phases
from uae_jax.training.rl.pieces import piece_key
from uae_jax.training.rl.token_update import TokenUpdate
from uae_jax.training.rl.update import UpdateContext, run_updates
from uae_jax.training.stages.generation_for_understanding import caption_metrics, in_chunks, make_open_captions
from uae_jax.training.stages.image_tokens import OpenImages, janus, make_open_images
from uae_jax.training.stages.spec import StageSpec

CAPTIONS, IMAGES = 0, 1


@flax.struct.dataclass
class TokenTree:
  """A rollout: captions of each image, and images of each caption.

  Made by the rollout phase; read by its reward and update phases. The first axis of every leaf is prompts.

  Attributes:
    captions: groups of captions [prompts, captions, L].
    images: groups of images as tokens [prompts, captions, images, image tokens].
    old_captions, old_images: log-probabilities of their tokens, replayed under the policy that sampled, or None when on
      policy.
  """

  captions: Captions
  images: Captions
  old_captions: jax.Array | None
  old_images: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
  """Rollout, reward, advantages and update as pure functions of parameters, batch and key."""

  networks: Networks
  options: JointTokenOptions
  open_images: OpenImages
  caption_update: TokenUpdate
  image_update: TokenUpdate
  ensemble: Ensemble
  advantage: AdvantageOptions

  def rollout(self, params, batch, key, step, piece=None):
    del step  # This rollout has no schedule.
    options = self.options
    caption_key, image_key = jax.random.split(key)
    pictures = captioner_images(batch)
    model = self.networks.uae(params)
    sampled = captions.sample_captions(
      model.captioner,
      self.networks.prompts,
      captions.caption_prefix(model, self.networks.prompts, pictures),
      piece_key(caption_key, piece),
      num_rollouts=options.num_rollouts,
      max_tokens=options.max_new_tokens,
      **options.token_sampling,
      records_kept=True,
    )
    texts = _join(sampled.tokens)
    policy, prefix, _ = self.open_images(params, texts, True)
    images = captions.sample_captions(
      policy,
      policy.prompts,
      prefix,
      piece_key(image_key, piece),
      num_rollouts=options.images_per_caption,
      max_tokens=policy.num_tokens,
      temperature=options.image_temperature,
      top_k=options.image_top_k,
      records_kept=True,
    )
    old_captions = self.caption_update.old_log_probs(params, pictures, sampled)
    old_images = self.image_update.old_log_probs(params, texts, images)
    shape = sampled.tokens.shape[:2]
    images, old_images = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), (images, old_images))
    return TokenTree(sampled, images, old_captions, old_images)

  def reward(self, params, batch, tree, key):
    del key  # All randomness is in the rollout.
    model, tokens = janus(self.networks, params), tree.images.tokens
    reconstructions = in_chunks(
      lambda rows: reconstruct.clip(model.decode_tokens(rows)),
      tokens.reshape(-1, tokens.shape[-1]),
      self.options.decode_chunks,
    )
    rewards, metrics = self.ensemble.measure(
      lambda name, x: self.networks.embed(params, name, x), to_signed(batch["image"]), reconstructions
    )
    by_prompt = to_pixels(reconstructions).reshape(tokens.shape[0], -1, *reconstructions.shape[1:])
    texts = jnp.repeat(tree.captions.tokens, self.options.images_per_caption, axis=1)
    return (rewards, metrics | caption_metrics(tree.captions)), RewardInputs(texts, by_prompt)

  def advantages(self, rewards):
    """((of captions float32[prompts, captions], of images float32[prompts, captions, images]), metrics)."""
    count = self.options.images_per_caption
    by_caption = {name: reward.reshape(reward.shape[0], -1, count) for name, reward in rewards.items()}
    means = {name: _mean_finite(reward) for name, reward in by_caption.items()}
    of_captions, metrics = self.ensemble.advantages(means, self.advantage)
    of_images, more = self.ensemble.advantages({name: _join(x) for name, x in by_caption.items()}, self.advantage)
    metrics |= {f"image_{name}": value for name, value in more.items()}
    return (of_captions, of_images.reshape(*of_captions.shape, count)), metrics

  def update(self, state, batch, tree, values):
    updates, settings = (self.caption_update, self.image_update), self.caption_update
    reference = state.assemble(state.reference) if settings.reference.interval else None
    num_gradients = settings.options.num_microbatches * len(updates)

    def loss(which, params, microbatch, known):
      return updates[which].objective_of_microbatch(reference, params, _groups(microbatch)[which], known)

    def prepare(params, microbatches):
      """(numbers of tokens or captions that the two losses divide by, their entropy thresholds) of a minibatch."""
      thresholds = (None, None)
      if settings.objective.top_entropy < 1:
        pairs = zip(updates, jax.vmap(_groups)(microbatches), strict=True)
        thresholds = tuple(update.entropy_threshold(params, groups) for update, groups in pairs)

      def counts(microbatch):
        known = [UpdateContext(jnp.bool_(True), prepared=threshold) for threshold in thresholds]
        return tuple(loss(which, params, microbatch, known[which])[0][1] for which in (CAPTIONS, IMAGES))

      return jax.tree.map(jnp.sum, jax.lax.map(counts, microbatches)), thresholds

    def objective(params, microbatch, known):
      counts, thresholds = known.prepared

      def part(which):
        (total, _), metrics = loss(which, params, microbatch, dataclasses.replace(known, prepared=thresholds[which]))
        weight = self.options.image_weight if which == IMAGES else 1.0
        nothing = jax.tree.map(jnp.zeros_like, metrics)
        words, images = (nothing, metrics) if which == IMAGES else (metrics, nothing)
        metrics = words | {f"image_{name}": value for name, value in images.items()}
        return weight * total / jnp.maximum(counts[which], 1e-8), metrics

      total, metrics = jax.lax.cond(known.part == IMAGES, lambda: part(IMAGES), lambda: part(CAPTIONS))
      # Each loss is already divided by its own count: those of all gradients add up to 1.
      return (total, jnp.float32(1 / num_gradients)), metrics

    return run_updates(
      state,
      (captioner_images(batch), tree, *values),
      objective,
      settings.options,
      settings.optimizer,
      ema_decay=settings.ema_decay,
      ema_interval=settings.ema_interval,
      reference=settings.reference,
      prepare=prepare,
      num_parts=len(updates),
    )


def _join(x: jax.Array) -> jax.Array:
  """[prompts, captions, ...] -> [prompts * captions, ...]: captions are the prompts of their images."""
  return x.reshape(-1, *x.shape[2:])


def _groups(microbatch):
  """What the updates of captions and of images read of a microbatch."""
  pictures, tree, of_captions, of_images = microbatch
  images = jax.tree.map(_join, (tree.images, tree.old_images, of_images))
  return (pictures, tree.captions, tree.old_captions, of_captions), (_join(tree.captions.tokens), *images)


def _mean_finite(rewards: jax.Array) -> jax.Array:
  """Mean of the finite rewards of the images of each caption, [..., images] -> [...]; NaN where there is none."""
  valid = jnp.isfinite(rewards)
  return jnp.sum(jnp.where(valid, rewards, 0), axis=-1) / jnp.sum(valid, axis=-1)


def make_phases(
  networks: Networks,
  options: JointTokenOptions,
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
  settings = (options.logit_chunks, objective, update_options, optimizer, ema_decay, ema_interval, reference)
  stage = _Stage(
    networks,
    options,
    open_images,
    TokenUpdate(make_open_captions(networks), options.temperature, *settings),
    TokenUpdate(open_images, options.image_temperature, *settings),
    ensemble,
    advantage,
  )
  return Phases(
    stage.rollout,
    lambda *arguments: stage.reward(*arguments)[0],
    stage.advantages,
    stage.update,
    reward_and_inputs=stage.reward,
    moves_reference=reference.interval > 0,
  )


def phases(config: Experiment, built: Built, optimizer: optax.GradientTransformation) -> Phases:
  """Makes the phases of the stage from a config."""
  section = config.joint_tokens
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
  observes_captions=True,
  samples_captions=lambda options: options.num_rollouts,
  needs_captions=lambda options: False,
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params),
  runs_suites=True,
  generates_by_captioner=True,
)

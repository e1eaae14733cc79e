"""The RL stages as pure steps: phases compose, microbatches add up, only adapters change, rollout and replay agree."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.properties.rl_world import OPTIMIZER, PROMPTS, ROLLOUTS, TOKENS, batch, built, mesh, params, state_of
from uae_jax import sharding, trees
from uae_jax.layers import lora
from uae_jax.models.prompts import generation_rows
from uae_jax.options import (
  TEXT_REWARDS,
  AdvantageOptions,
  GenerationForUnderstandingOptions,
  ImageObjective,
  ReferenceOptions,
  TokenObjective,
  UnderstandingForGenerationOptions,
  UnderstandingForGenerationStage,
  UpdateOptions,
)
from uae_jax.rollouts import captions, reconstruct
from uae_jax.rollouts.conditioning import encode_captions
from uae_jax.rollouts.images import sample_sde, velocity_field
from uae_jax.training.rl import pieces
from uae_jax.training.rl import update as update_module
from uae_jax.training.rl.phases import compose, phase_keys
from uae_jax.training.stage import phased_step
from uae_jax.training.stages import generation_for_understanding as stage2
from uae_jax.training.stages import understanding_for_generation as stage3

WITH_KL = {"captioner": TokenObjective(beta=0.1), "decoder": ImageObjective(beta=0.1)}
ADVANTAGES = jnp.asarray(np.random.default_rng(0).normal(size=(PROMPTS, ROLLOUTS)), jnp.float32)


def captioner_phases(optimizer=OPTIMIZER, objective=WITH_KL["captioner"], reference=None, **changes):
  update = UpdateOptions(**{name: changes.pop(name) for name in list(changes) if name in UPDATES})
  fields = dict(num_rollouts=ROLLOUTS, max_new_tokens=TOKENS, sampler_steps=2, held_out_embedder="dinov2") | changes
  options = GenerationForUnderstandingOptions(**fields)
  return stage2.make_phases(
    built().networks, options, objective, AdvantageOptions(), update, optimizer, reference=reference
  )


def decoder_phases(optimizer=OPTIMIZER, objective=WITH_KL["decoder"], reference=None, **changes):
  update = UpdateOptions(**{name: changes.pop(name) for name in list(changes) if name in UPDATES})
  fields = dict(
    num_rollouts=ROLLOUTS,
    max_new_tokens=TOKENS,
    captions="dataset",
    sampler_steps=5,
    window_range=(0, 2),
    window=2,
    held_out_embedder="dinov2",
  )
  options = UnderstandingForGenerationOptions(**(fields | changes))
  # The section validates options and objective against each other.
  UnderstandingForGenerationStage(batch_size=24, options=options, objective=objective, updates=update)
  return stage3.make_phases(
    built().networks, options, objective, AdvantageOptions(), update, optimizer, reference=reference
  )


UPDATES = ("num_epochs", "num_minibatches", "num_microbatches")
STAGES = {"captioner": captioner_phases, "decoder": decoder_phases}


@functools.cache
def rolled_out(net):
  """A rollout of the default phases of a stage."""
  phases, state = STAGES[net](), state_of(net)
  key, _ = phase_keys(state)
  return jax.jit(phases.rollout)(state.params, batch(), key, state.step)


def updated(net, phases, trajectory=None, state=None, values=ADVANTAGES):
  """(state, metrics) after the update phase; the rollout is from these phases unless one is given."""
  state = state_of(net) if state is None else state
  if trajectory is None:
    key, _ = phase_keys(state)
    trajectory = jax.jit(phases.rollout)(phases.sampling_params(state), batch(), key, state.step)
  return jax.jit(phases.update)(state, batch(), trajectory, values)


def moved(after, before) -> bool:
  pairs = zip(*map(jax.tree.leaves, (after.trainable, before.trainable)), strict=True)
  return any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("net", STAGES)
def test_whole_step_equals_phases_and_moves_only_adapters(net):
  phases, state = STAGES[net](), state_of(net)
  whole, metrics = jax.jit(compose(phases))(state, batch())
  _, reward_key = phase_keys(state)
  trajectory = rolled_out(net)
  (rewards, measured), reward_inputs = jax.jit(phases.reward_and_inputs)(state.params, batch(), trajectory, reward_key)
  values, _ = phases.advantages(rewards)
  apart, apart_metrics = updated(net, phases, trajectory, state, values)
  for (path, ours), (_, theirs) in zip(trees.items(whole.trainable), trees.items(apart.trainable), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=path)
  assert jax.tree.all(jax.tree.map(np.array_equal, whole.frozen, state.frozen))
  assert moved(whole, state)
  assert {"reward", "reward_clip", "reward_clip_std_in_group", "held_out_reward", "advantage_abs_mean"} <= set(metrics)
  np.testing.assert_allclose(metrics["held_out_reward"], measured["held_out_reward"], atol=1e-5)
  assert reward_inputs.images.shape == (PROMPTS, ROLLOUTS, 32, 32, 3) and reward_inputs.images.dtype == jnp.uint8
  for found in (metrics, apart_metrics):
    assert found["ratio_mean"] == 1.0
    assert found["clip_fraction"] == 0.0
    assert found["log_prob_difference_max"] < 1e-4


@pytest.mark.parametrize("net", STAGES)
def test_the_first_of_several_updates_has_ratio_one_on_a_mesh(net, monkeypatch):
  """The ratio is exactly 1, although off policy the old log-probabilities come from a separate program.

  With adapters that are still zero, the policy is the reference, so the KL to it is 0; for images only up to rounding,
  because the step is compiled once with and once without its gradient.
  """
  monkeypatch.setattr(update_module, "_over_updates", lambda name, values: values[0])
  plain = trees.from_items(
    (path, jnp.zeros_like(leaf) if path.endswith("lora_b") else leaf) for path, leaf in trees.items(params())
  )
  phases = STAGES[net](num_epochs=2, num_minibatches=2)
  key = jax.random.key(1)
  rows = jax.device_put(batch(), sharding.batch_sharding(mesh()).update(spec=jax.P("data")))
  with jax.set_mesh(mesh()):
    state = state_of(net, jax.device_put(plain, built().shardings))
    trajectory = jax.jit(phases.rollout)(state.params, rows, key, state.step)
    _, metrics = jax.jit(phases.update)(state, rows, trajectory, ADVANTAGES)
  assert metrics["ratio_mean"] == 1.0
  for name in ("ratio_variance", "clip_fraction", "approximate_kl"):
    assert metrics[name] == 0.0, name
  assert metrics["kl"] <= (0.0 if net == "captioner" else 1e-13)


def test_microbatches_add_to_the_batch_of_captions():
  """With the entropy threshold of the whole batch, which no microbatch can compute alone."""
  objective = TokenObjective(loss="bnpo", top_entropy=0.4, entropy_bonus=0.01, truncation="mask")
  results = [
    updated("captioner", captioner_phases(objective=objective, num_microbatches=count), rolled_out("captioner"))
    for count in (1, 2)
  ]
  assert_equal_updates(*results)


def test_microbatches_and_chunks_of_groups_add_to_the_batch_of_images():
  phases = decoder_phases(), decoder_phases(num_microbatches=2, replay_chunks=3)
  assert_equal_updates(*(updated("decoder", each, rolled_out("decoder")) for each in phases))


@pytest.mark.slow
@pytest.mark.parametrize("net", STAGES)
def test_microbatches_on_eight_devices_add_to_the_batch_on_one(net):
  objectives = {"captioner": TokenObjective(loss="bnpo", beta=0.1), "decoder": ImageObjective(beta=0.1)}
  whole, pieces = (STAGES[net](objective=objectives[net], num_microbatches=count) for count in (1, 2))
  one = updated(net, whole, rolled_out(net))
  place = sharding.batch_sharding(mesh()).update(spec=jax.P("data"))
  tree, rows, values = jax.device_put(params(), built().shardings), jax.device_put(batch(), place), ADVANTAGES
  trajectory = jax.tree.map(lambda x: jax.device_put(np.asarray(x), place), rolled_out(net))
  with jax.set_mesh(mesh()):
    other = jax.jit(pieces.update)(state_of(net, tree), rows, trajectory, values)
  assert_equal_updates(one, other)


def assert_equal_updates(one, other):
  for name in one[1]:
    np.testing.assert_allclose(one[1][name], other[1][name], rtol=2e-4, atol=1e-6, err_msg=name)
  for (path, ours), (_, theirs) in zip(trees.items(one[0].trainable), trees.items(other[0].trainable), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("net", STAGES)
def test_a_moving_reference_starts_as_the_policy_and_follows_it(net):
  phases = STAGES[net](reference=ReferenceOptions(interval=1, alpha=0.6))
  assert phases.moves_reference and not STAGES[net]().moves_reference
  first = state_of(net, has_reference=True)
  state, metrics = updated(net, phases, rolled_out(net), first)
  # The fixed reference, without adapters, would be far away.
  assert 0 <= metrics["kl"] < 1e-9
  expected = jax.tree.map(lambda old, new: 0.4 * old + 0.6 * new, first.trainable, state.trainable)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.reference, expected)
  assert moved(state, first)


def test_answer_conditioning_guidance_and_own_noise_in_stage_2():
  """Also with every text reward beside the embedder, measured on the device."""
  weights = (("clip", 1.0), *((name, 0.1) for name in TEXT_REWARDS))
  phases = captioner_phases(conditioning="answer", guidance=2.0, is_noise_shared=False, reward_weights=weights)
  state = state_of("captioner")
  trajectory = jax.jit(phases.rollout)(state.params, batch(), jax.random.key(1), state.step)
  rewards, _ = jax.jit(phases.reward)(state.params, batch(), trajectory, jax.random.key(2))
  assert set(rewards) == {"clip", *TEXT_REWARDS}
  assert all(value.shape == (PROMPTS, ROLLOUTS) and np.isfinite(value).all() for value in rewards.values())
  values, metrics = phases.advantages(rewards)
  assert np.any(values != 0) and {"reward_length", "reward_format_std_in_group"} <= set(metrics)


def test_exact_kl_and_sampler_correction_in_stage_2():
  """The exact KL at the captions equals its definition from the logits of all tokens that can be sampled."""
  objective = TokenObjective(beta=0.1, kl="exact", sampling_cap=2.0, off_policy_threshold=1.0)
  state, metrics = updated("captioner", captioner_phases(objective=objective), rolled_out("captioner"))
  assert moved(state, state_of("captioner"))
  sampled, networks = rolled_out("captioner").captions, built().networks
  is_sampled = np.flatnonzero(networks.prompts.vocabulary(built().processor.vocab_size))

  @jax.jit
  def divergence(params, images, sampled):
    models = [networks.uae(params, adapters=adapters) for adapters in (True, False)]
    logits = []
    for model in models:
      prefix = captions.caption_prefix(model, networks.prompts, images)
      hidden, _ = captions.caption_hidden(model.captioner, prefix, sampled.tokens)
      logits.append(jax.nn.log_softmax(model.captioner.logits(hidden)[..., is_sampled]))
    kl = jnp.sum(jnp.exp(logits[0]) * (logits[0] - logits[1]), axis=-1)
    return jnp.sum(kl * sampled.mask) / jnp.sum(sampled.mask)

  expected = divergence(params(), batch()["image"], sampled)
  assert expected > 0
  np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-4)


def test_guidance_off_in_training_alone_and_answer_conditioning_in_stage_3():
  phases = decoder_phases(
    guidance=2.0, is_guided_in_training=False, conditioning="answer", window_strategy="progressive", window_stride=2
  )
  before = state_of("decoder")
  state, metrics = updated("decoder", phases)
  assert moved(state, before)
  assert metrics["ratio_mean"] == 1.0
  # The sampler's own log-probabilities belong to a different velocity.
  assert metrics["log_prob_difference"] > 1e-4


@pytest.mark.parametrize("loss", ["flow_grpo", "nft"])
def test_a_guidance_interval_that_ends_in_the_window(loss):
  """The noise levels of the window are 1 and 0.93, or 0.93 and 0.82: guidance begins after its first step."""
  phases = decoder_phases(
    objective=ImageObjective(loss=loss), guidance=2.0, guidance_interval=(0.2, 0.95), window_strategy="fixed"
  )
  state, metrics = updated("decoder", phases)
  assert moved(state, state_of("decoder"))
  if loss == "nft":
    assert metrics["old_distance"] == 0.0
  else:
    assert metrics["ratio_mean"] == 1.0
    assert metrics["log_prob_difference_max"] < 1e-4


def test_nft_on_policy_from_ode_samples():
  phases = decoder_phases(objective=ImageObjective(loss="nft", beta=0.1), sampler="ode", is_noise_shared=False)
  state, metrics = updated("decoder", phases)
  assert moved(state, state_of("decoder"))
  assert metrics["old_distance"] == 0.0 and metrics["kl"] > 0


@pytest.mark.parametrize("loss", ["nft", "awm"])
def test_the_slow_average_samples_and_follows(loss):
  """In the first update the old policy equals the new one; later the average follows its decay."""
  objective = ImageObjective(loss=loss, average_beta=0.1)
  phases = decoder_phases(
    objective=objective,
    sampler="ode" if loss == "nft" else "cps",
    is_noise_shared=loss == "awm",
    samples_from="old",
    old_decay=0.5,
    old_decay_slope=0.25,
  )
  first = state_of("decoder", has_old=True)
  state, metrics = updated("decoder", phases, state=first)
  # The rollout is a separate program: equal up to rounding.
  assert metrics["old_distance"] < 1e-10 and metrics["average_distance"] < 1e-10
  np.testing.assert_allclose(metrics.get("ratio_mean", 1.0), 1.0, atol=1e-6)
  # The decay grows from 0: the average is a copy after the first rollout and lags after the second.
  assert moved(state, first)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.old, state.trainable)
  if loss == "nft":
    after, metrics = updated("decoder", phases, state=state)
    expected = jax.tree.map(lambda old, new: 0.25 * old + 0.75 * new, state.old, after.trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.old, expected)
    assert moved(after, state)


@pytest.mark.parametrize(
  ("refused", "message"),
  [
    (lambda: decoder_phases(sampler="ode"), "sampler"),
    (lambda: decoder_phases(objective=ImageObjective(loss="nft"), sampler="ode"), "is_noise_shared"),
    (lambda: decoder_phases(old_decay=0.5), "old_decay is for"),
    (lambda: decoder_phases(objective=ImageObjective(loss="nft"), samples_from="old"), "needs old_decay"),
    (lambda: decoder_phases(objective=ImageObjective(loss="nft", average_beta=1.0)), "needs options.old_decay"),
    (lambda: decoder_phases(reward_weights=(("length", 1.0),)), "one caption"),
    (lambda: decoder_phases(window_range=(0, 4)), "last with a density"),
    (lambda: decoder_phases(replay_chunks=2), "replay_chunks"),
    (lambda: captioner_phases(reward_weights=(("dinov2", 1.0),)), "held_out_embedder"),
    (lambda: captioner_phases(reward_weights=(("longclip", 1.0),)), "longclip"),
    (lambda: captioner_phases(reward_weights=(("clip", 0.0),)), "no reward has a weight"),
    (lambda: captioner_phases(conditioning="caption"), "conditioning"),
  ],
)
def test_contradictions_are_refused(refused, message):
  with pytest.raises(ValueError, match=message):
    refused()


def test_replay_of_sampled_captions_gives_their_log_probs():
  networks, images = built().networks, batch()["image"]

  @jax.jit
  def sample(params):
    model = networks.uae(params)
    prefix = captions.caption_prefix(model, networks.prompts, images)
    key, sizes = jax.random.key(0), dict(num_rollouts=ROLLOUTS, max_tokens=TOKENS, temperature=1.3)
    return captions.sample_captions(model.captioner, networks.prompts, prefix, key, **sizes)

  @functools.partial(jax.jit, static_argnames="num_chunks")
  def replay(params, tokens, num_chunks):
    options = dict(temperature=1.3, num_chunks=num_chunks)
    return captions.caption_log_probs(networks.uae(params), networks.prompts, images, tokens, **options)

  sampled = sample(params())
  log_probs, entropy = replay(params(), sampled.tokens, 1)
  np.testing.assert_allclose(log_probs * sampled.mask, sampled.log_probs, atol=1e-5)
  assert np.all(entropy >= 0)
  chunked, _ = replay(params(), sampled.tokens, 2)
  np.testing.assert_allclose(chunked, log_probs, atol=1e-6)


TRUNCATED = dict(temperature=1.3, top_k=6, top_p=0.9, min_p=0.05)


def test_replay_of_truncated_captions_uses_the_kept_tokens_of_the_rollout():
  networks, images = built().networks, batch()["image"]
  phases = captioner_phases(**TRUNCATED)
  sampled = jax.jit(phases.rollout)(params(), batch(), jax.random.key(0), jnp.int32(0)).captions
  vocabulary = built().processor.vocab_size
  is_kept = np.unpackbits(np.asarray(sampled.kept), axis=-1, count=vocabulary).astype(bool)
  sizes = is_kept[np.asarray(sampled.mask)].sum(axis=-1)
  assert sizes.min() >= 1 and sizes.max() <= 6 and len(set(sizes)) > 1
  assert not is_kept[np.asarray(sampled.mask)][:, ~networks.prompts.vocabulary(vocabulary)].any()

  @jax.jit
  def logits_of(params):
    model = networks.uae(params)
    prefix = captions.caption_prefix(model, networks.prompts, images)
    return model.captioner.logits(captions.caption_hidden(model.captioner, prefix, sampled.tokens)[0])

  logits = np.where(is_kept, np.asarray(logits_of(params()), np.float64) / 1.3, -np.inf)
  with np.errstate(divide="ignore", invalid="ignore"):  # Nothing is kept after the end of a caption.
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  expected = np.take_along_axis(log_p, np.asarray(sampled.tokens)[..., None], axis=-1)[..., 0]
  mask = np.asarray(sampled.mask)
  np.testing.assert_allclose(np.asarray(sampled.log_probs)[mask], expected[mask], atol=1e-5)
  for num_chunks in (1, 2):
    options = dict(temperature=1.3, kept=sampled.kept, num_chunks=num_chunks)
    replayed, entropy = captions.caption_log_probs(
      networks.uae(params()), networks.prompts, images, sampled.tokens, **options
    )
    np.testing.assert_allclose(np.asarray(replayed)[mask], expected[mask], atol=1e-5)
    assert np.all(np.asarray(entropy)[mask] <= np.log(sizes) + 1e-5)


def test_truncated_rollouts_have_ratio_one_before_the_first_update(monkeypatch):
  monkeypatch.setattr(update_module, "_over_updates", lambda name, values: values[0])
  state, metrics = updated("captioner", captioner_phases(**TRUNCATED, num_minibatches=2))
  assert moved(state, state_of("captioner"))
  assert metrics["ratio_mean"] == 1.0 and metrics["ratio_variance"] == 0.0
  assert metrics["log_prob_difference_max"] < 1e-4 and np.isfinite(metrics["kl"]) and np.isfinite(metrics["grad_norm"])


def test_templating_on_the_device_equals_the_processor():
  prompts, processor, tokens = built().networks.prompts, built().processor, jnp.asarray(batch()["tokens"])
  rows, row_mask = generation_rows(prompts, tokens, captions.caption_mask(tokens, prompts))
  for row, length, ids in zip(np.asarray(rows), np.asarray(row_mask.sum(axis=1)), batch()["tokens"], strict=True):
    assert list(row[:length]) == list(processor.generation_prompt(processor.decode(ids)))


def test_shared_noise_prefix_equals_the_prefix_of_each():
  """Running the ODE prefix once per group gives the same trajectories as running it for every rollout."""
  networks = built().networks
  noise = jax.random.normal(jax.random.key(5), (PROMPTS, 4, 4, 16))

  @functools.partial(jax.jit, static_argnames="is_noise_shared")
  def run(params, noise, is_noise_shared):
    model = networks.uae(params)
    context = encode_captions(networks.prompts, model, jnp.asarray(batch()["tokens"]))
    return sample_sde(
      lambda repeat: velocity_field(model, context.repeat(repeat)),
      noise,
      jax.random.key(6),
      jnp.int32(2),
      num_rollouts=ROLLOUTS,
      is_noise_shared=is_noise_shared,
      num_steps=6,
      shift=3.0,
      window=2,
      kind="flow",
      noise_level=0.7,
    )

  shared, separate = run(params(), noise, True), run(params(), jnp.repeat(noise, ROLLOUTS, axis=0), False)
  np.testing.assert_allclose(shared.final, separate.final, atol=1e-5)
  np.testing.assert_allclose(shared.log_probs, separate.log_probs, atol=1e-5)


def test_steps_before_the_window_run_once_per_group():
  rows = []

  def make_velocity(repeat):
    def velocity(latents, sigma):
      rows.append((repeat, len(latents)))
      return latents * sigma

    return velocity

  options = dict(num_rollouts=ROLLOUTS, num_steps=6, shift=3.0, window=2, kind="flow", noise_level=0.7)
  noise, key = jnp.ones((PROMPTS, 4, 4, 16)), jax.random.key(0)
  jax.eval_shape(lambda start: sample_sde(make_velocity, noise, key, start, is_noise_shared=True, **options), 2)
  group = (ROLLOUTS, PROMPTS * ROLLOUTS)
  assert rows[0] == (1, PROMPTS) and set(rows[1:]) == {group}


def test_the_negative_prompt_is_encoded_once_per_rollout(monkeypatch):
  calls, encode = [], reconstruct.encode_negative
  monkeypatch.setattr(reconstruct, "encode_negative", lambda *inputs: calls.append(inputs) or encode(*inputs))
  phases, state, key = decoder_phases(guidance=2.0), state_of("decoder"), jax.random.key(0)
  trajectory = jax.eval_shape(phases.rollout, state.params, batch(), key, state.step)
  jax.eval_shape(phases.reward, state.params, batch(), trajectory, key)
  jax.eval_shape(phases.update, state, batch(), trajectory, ADVANTAGES)
  assert len(calls) == 1 and len(trajectory.negative.states) == 1


def test_adapters_off_leaves_its_argument_alone():
  model = built().networks.uae(params())
  reference = lora.adapters_off(model)
  flags = [[m.adapters for _, m in nnx.iter_modules(x) if isinstance(m, lora.Linear)] for x in (model, reference)]
  assert all(flags[0]) and not any(flags[1])


def test_adapters_off_is_the_base():
  networks = built().networks
  without = nnx.to_pure_dict(nnx.state(networks.uae(params())))
  zeroed = trees.from_items(
    (path, jnp.zeros_like(leaf) if path.endswith("lora_b") else leaf) for path, leaf in trees.items(without)
  )
  tokens = jnp.asarray(batch()["tokens"])
  encode = jax.jit(
    lambda params, adapters: networks.uae(params, adapters=adapters).encode_text(tokens, tokens >= 0),
    static_argnames="adapters",
  )
  reference = encode(params(), adapters=False)
  np.testing.assert_array_equal(reference, encode(zeroed, adapters=True))
  assert not np.allclose(reference, encode(params(), adapters=True))


@pytest.mark.parametrize("net", ["decoder", pytest.param("captioner", marks=pytest.mark.slow)])
def test_a_step_in_pieces_joins_them_in_the_order_of_the_batch(net):
  """Each row is that of its piece, generated alone; the window of SDE steps is that of the whole step."""
  phases, state = STAGES[net](), state_of(net)
  key, reward_key = phase_keys(state)
  rows = batch() | {"index": np.arange(PROMPTS)}
  rollout, reward = jax.jit(phases.rollout), jax.jit(phases.reward)
  parts, measured = [], []
  for i in range(2):
    piece = pieces.cut(rows, i, 2)
    np.testing.assert_array_equal(piece["index"], rows["index"][i::2])
    parts.append(rollout(state.params, piece, key, state.step, jnp.int32(i)))
    measured.append(reward(state.params, piece, parts[-1], pieces.piece_key(reward_key, i)))
  joined = phases.join(parts)
  asked = []

  class Judge:
    name = "http"

    def begin(self, rows, inputs):
      asked.append(inputs.tokens.shape[0])
      return rows["index"]

    def finish(self, begun):
      return np.asarray(pieces.join([index[:, None] for index in begun]))

    def cancel(self):
      raise AssertionError

  def update(state, batch, trajectory, values):
    return state, {"trajectory": trajectory, "values": values}

  stepped = dataclasses.replace(
    phases,
    host_rewards=(Judge(),),
    num_pieces=2,
    advantages=lambda rewards: (rewards["clip"], {"http": rewards["http"]}),
    update=update,
  )
  # The step takes over the buffers of its state; all tests share those of the parameters.
  _, seen = phased_step(stepped)(jax.tree.map(jnp.copy, state), rows)
  assert asked == [PROMPTS // 2] * 2
  np.testing.assert_array_equal(seen["http"][:, 0], rows["index"])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), seen["trajectory"], joined)
  np.testing.assert_allclose(seen["values"], pieces.join([part[0]["clip"] for part in measured]), atol=1e-4)
  np.testing.assert_allclose(
    seen["held_out_reward"], np.mean([part[1]["held_out_reward"] for part in measured]), atol=1e-5
  )
  if net == "decoder":
    assert len(np.unique(joined.record.index, axis=0)) == 1
    guided = [dataclasses.replace(part, negative=parts[0].context) for part in parts]
    assert phases.join(guided).negative is parts[0].context
    assert not np.array_equal(joined.record.latents[0], joined.record.latents[1])

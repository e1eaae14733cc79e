"""Prefill and extend, token by token or all at once, equal the language model on each complete sequence."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import trees
from uae_jax.models.language import LanguageConfig, LanguageModel
from uae_jax.models.positions import next_position, text_positions

CONFIG = LanguageConfig(
  vocab_size=23,
  width=32,
  depth=3,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  mlp_width=40,
  mrope_sections=(1, 2, 1),
  rope_theta=1e3,
)
LENGTHS = (7, 3)  # lengths of the two prompts
ROLLOUTS, TOKENS = 3, 5


@dataclasses.dataclass
class Case:
  graphdef: nnx.GraphDef
  params: dict
  embeddings: jax.Array  # [B, P, D]
  positions: np.ndarray
  mask: np.ndarray
  more: jax.Array  # [B, R, T, D]
  more_positions: np.ndarray

  def language(self, params=None) -> LanguageModel:
    return nnx.merge(self.graphdef, self.params if params is None else params)


def make_case(padding: str, config: LanguageConfig = CONFIG) -> Case:
  """Ragged prompts, padded on one side, with positions that differ between the three axes."""
  with nnx.use_eager_sharding(False):
    model = LanguageModel(config, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(model)
  rng = np.random.default_rng(0)

  def noise(x):
    return x + 0.2 * rng.normal(size=x.shape).astype(np.float32)

  params = jax.tree.map(noise, nnx.to_pure_dict(state))
  batch, width = len(LENGTHS), max(LENGTHS)
  mask = np.arange(width) < np.array(LENGTHS)[:, None]
  mask = mask[:, ::-1].copy() if padding == "left" else mask
  positions = np.array(text_positions(mask))
  positions[1:] += np.where(mask, rng.integers(0, 3, (2, batch, width)), 0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=(*shape, config.width)), jnp.float32)

  first = next_position(positions, mask)
  more_positions = np.broadcast_to(first[:, None, None] + np.arange(TOKENS), (3, batch, ROLLOUTS, TOKENS))
  embeddings, more = draw(batch, width), draw(batch, ROLLOUTS, TOKENS)
  return Case(graphdef, params, embeddings, positions, mask, more, more_positions.astype(np.int32))


@pytest.fixture(scope="module", params=["right", "left"])
def case(request) -> Case:
  return make_case(request.param)


@pytest.fixture(scope="module")
def expected(case) -> jax.Array:
  return whole(case)


def whole(case: Case, params=None, embeddings=None, more=None) -> jax.Array:
  """Runs each rollout alone after its own copy of the prompt, without padding: [B, R, T, D]."""
  language = case.language(params)
  embeddings = case.embeddings if embeddings is None else embeddings
  more = case.more if more is None else more
  rows = []
  for b, length in enumerate(LENGTHS):
    real = np.flatnonzero(case.mask[b])
    prompt = jnp.broadcast_to(embeddings[b, real], (ROLLOUTS, length, CONFIG.width))
    before = np.broadcast_to(case.positions[:, b][:, None, real], (3, ROLLOUTS, length))
    sequence = jnp.concatenate([prompt, more[b]], axis=1)
    positions = np.concatenate([before, case.more_positions[:, b]], axis=-1)
    rows.append(language(sequence, positions, np.ones(sequence.shape[:2], bool))[:, length:])
  return jnp.stack(rows)


def replay(case: Case, params=None, embeddings=None, more=None) -> jax.Array:
  """Teacher forcing over the shared prefix: [B, R, T, D]."""
  language = case.language(params)
  embeddings = case.embeddings if embeddings is None else embeddings
  _, prefix = language.prefill(embeddings, case.positions, case.mask)
  hidden, suffix = language.extend(case.more if more is None else more, case.more_positions, prefix)
  assert suffix is None
  return hidden


def decode(case: Case, step: int, slots: int, dtype=jnp.float32) -> jax.Array:
  """Decodes `step` tokens at a time into a cache of `slots`, with a traced `start`: [B, R, T, D]."""
  language = case.language()
  _, prefix = language.prefill(case.embeddings, case.positions, case.mask)
  extend = jax.jit(lambda *arguments: language.extend(*arguments))
  suffix = language.init_suffix(len(LENGTHS), ROLLOUTS, slots, dtype)
  parts = []
  for start in range(0, TOKENS, step):
    window = slice(start, start + step)
    part = case.more[:, :, window], case.more_positions[..., window]
    hidden, suffix = extend(*part, prefix, suffix, jnp.int32(start))
    parts.append(hidden)
  return jnp.concatenate(parts, axis=2)


def test_teacher_forcing_equals_whole_sequences(case, expected):
  np.testing.assert_allclose(replay(case), expected, atol=1e-5)


@pytest.mark.parametrize("step, slots", [(1, TOKENS), (1, TOKENS + 4), (2, TOKENS + 1), (TOKENS, TOKENS)])
def test_decoding_equals_whole_sequences(case, expected, step, slots):
  np.testing.assert_allclose(decode(case, step, slots), expected, atol=1e-5)


def test_what_later_slots_hold_does_not_matter(case):
  language = case.language()
  _, prefix = language.prefill(case.embeddings, case.positions, case.mask)
  empty = language.init_suffix(len(LENGTHS), ROLLOUTS, 4)
  dirty = jax.tree.map(lambda x: x + 100.0, empty)
  first = case.more[:, :, :1], case.more_positions[..., :1], prefix
  np.testing.assert_array_equal(language.extend(*first, empty)[0], language.extend(*first, dirty)[0])


def test_prefill_equals_the_plain_call(case):
  language = case.language()
  arguments = case.embeddings, case.positions, case.mask
  hidden, prefix = language.prefill(*arguments)
  np.testing.assert_array_equal(hidden, language(*arguments))
  assert prefix.k.shape == (CONFIG.depth, 2, max(LENGTHS), CONFIG.num_kv_heads, CONFIG.head_width)


def test_padding_changes_nothing(case):
  """Neither the content nor the amount of padding has an effect."""
  language = case.language()
  hidden = language(case.embeddings, case.positions, case.mask)
  noisy = jnp.where(case.mask[..., None], case.embeddings, 100.0)
  np.testing.assert_allclose(language(noisy, case.positions, case.mask)[case.mask], hidden[case.mask], atol=1e-6)

  def pad(x, axis):
    return jnp.pad(x, [(0, 3 if i == axis else 0) for i in range(x.ndim)])

  wider = language(pad(case.embeddings, 1), pad(case.positions, 2), pad(case.mask, 1))[:, :-3]
  np.testing.assert_allclose(wider[case.mask], hidden[case.mask], atol=1e-5)
  for b in range(len(LENGTHS)):
    real = np.flatnonzero(case.mask[b])
    alone = language(case.embeddings[b : b + 1, real], case.positions[:, b : b + 1, real], case.mask[b : b + 1, real])
    np.testing.assert_allclose(alone[0], hidden[b, real], atol=1e-5)


def test_the_future_and_other_rollouts_change_nothing(case):
  hidden = replay(case)
  later = case.more.at[:, :, 3:].add(1.0)
  np.testing.assert_array_equal(replay(case, more=later)[:, :, :3], hidden[:, :, :3])
  others = case.more.at[:, 1:].add(1.0)
  np.testing.assert_allclose(replay(case, more=others)[:, 0], hidden[:, 0], atol=1e-6)


@pytest.mark.parametrize("case", ["right"], indirect=True)
def test_gradients_flow_through_the_prefix(case):
  target = np.random.default_rng(1).normal(size=case.more.shape).astype(np.float32)

  def grads(function):
    def loss(params, embeddings, more):
      return jnp.sum(function(case, params, embeddings, more) * target)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(case.params, case.embeddings, case.more)

  (got, *got_inputs), (want, *want_inputs) = grads(replay), grads(whole)
  for (path, ours), (_, theirs) in zip(trees.items(got), trees.items(want), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())), err_msg=path)
  assert jnp.abs(got_inputs[0][case.mask]).min() > 0
  for ours, theirs in zip(got_inputs, want_inputs, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("change", [{"unroll": True}, {"remat": "full"}])
def test_layers_written_out_are_equal(change):
  plain = make_case("right")
  other = make_case("right", dataclasses.replace(CONFIG, **change))
  np.testing.assert_allclose(replay(other), replay(plain), atol=1e-5)
  np.testing.assert_allclose(decode(other, 1, TOKENS), decode(plain, 1, TOKENS), atol=1e-5)


def test_a_cache_may_be_narrower_than_the_activations(case, expected):
  np.testing.assert_allclose(decode(case, 1, TOKENS, jnp.bfloat16), expected, atol=5e-2)

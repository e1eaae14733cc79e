"""Token GRPO on image tokens of Janus: the first ratio is 1, adapters learn, a mesh changes nothing but rounding."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding, trees
from uae_jax.algorithms import grpo
from uae_jax.layers import lora
from uae_jax.models.janus.model import Janus, JanusConfig
from uae_jax.models.janus.vq import VQConfig
from uae_jax.models.language import LanguageConfig
from uae_jax.models.vit import PatchTowerConfig
from uae_jax.options import TokenObjective
from uae_jax.rollouts.captions import caption_hidden, sample_captions, token_log_probs
from uae_jax.rollouts.image_tokens import ImageTokens

CONFIG = JanusConfig(
  vision=PatchTowerConfig(image_px=8, patch=2, width=16, depth=1, num_heads=2, mlp_width=16),
  language=LanguageConfig(
    vocab_size=24,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    mlp_width=32,
    mrope_sections=(4, 0, 0),
    qkv_bias=False,
  ),
  vq=VQConfig((32, 32), layers_per_block=1, latent_channels=8, num_codes=32, code_width=4),
  image_head_width=32,
  image_token_id=3,
)
BEGIN, PAD, BEGIN_IMAGE = 0, 2, 4
PROMPTS = np.array([[BEGIN, 7, 9 + i, BEGIN_IMAGE] for i in range(8)], np.int32)
GUIDANCE, ROLLOUTS = 3.0, 2


def build() -> Janus:
  model = Janus(CONFIG, rngs=nnx.Rngs(0))
  lora.attach(model, lora.LoRA(4, 8.0, CONFIG.adapter_targets), rngs=nnx.Rngs(1))
  return model


def random_params(shapes: dict) -> dict:
  rng = np.random.default_rng(0)

  def value(path: str, leaf):
    around = 1.0 if path.endswith("scale") else 0.0
    return jax.device_put((around + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding)

  return trees.from_items((path, value(path, leaf)) for path, leaf in trees.items(shapes))


@functools.cache
def step(shape: tuple[int, int, int]):
  """(tokens, log-probabilities, mean ratio, loss, gradients of the adapters) of one group per prompt on a mesh."""
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
  graphdef, shapes = sharding.abstract_model(build, mesh)
  adapters, frozen = trees.split(random_params(shapes), lora.is_adapter)
  rows = jax.device_put(PROMPTS, sharding.batch_sharding(mesh))
  advantages = jnp.asarray([[1.0, -1.0]] * len(PROMPTS))

  def policy_of(adapters, frozen, rows):
    model = nnx.merge(graphdef, trees.merge(adapters, frozen))
    policy, mask = ImageTokens(model, GUIDANCE), jnp.ones(rows.shape, bool)
    return policy, policy.prefix(model.embed(rows), mask, model.embed(jnp.array([[PAD]])))

  def rollout(adapters, frozen, rows):
    policy, prefix = policy_of(adapters, frozen, rows)
    return sample_captions(
      policy,
      policy.prompts,
      prefix,
      jax.random.key(2),
      num_rollouts=ROLLOUTS,
      max_tokens=CONFIG.num_image_tokens,
      temperature=1.0,
    )

  def replay(adapters, frozen, rows, tokens):
    policy, prefix = policy_of(adapters, frozen, rows)
    return token_log_probs(policy, caption_hidden(policy, prefix, tokens)[0], tokens)[0]

  def loss(adapters, frozen, rows, sampled, old):
    log_probs = replay(adapters, frozen, rows, sampled.tokens)
    found, _ = grpo.token_objective(TokenObjective(), log_probs, old, advantages, sampled.mask)
    return found.sum / found.count, jnp.exp(log_probs - old)

  with jax.set_mesh(mesh):
    sampled = jax.jit(rollout)(adapters, frozen, rows)
    old = jax.jit(replay)(adapters, frozen, rows, sampled.tokens)
    (value, ratio), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters, frozen, rows, sampled, old)
  return jax.device_get((sampled.tokens, sampled.log_probs, old, value, ratio, gradients))


def test_the_first_ratio_is_one_and_adapters_learn():
  tokens, log_probs, old, _, ratio, gradients = step((1, 1, 1))
  np.testing.assert_allclose(old, log_probs, atol=1e-5)
  np.testing.assert_allclose(ratio, 1.0, atol=1e-5)
  assert len({tuple(row) for row in tokens.reshape(-1, tokens.shape[-1])}) == tokens.shape[0] * ROLLOUTS
  for path, gradient in trees.items(gradients):
    assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_a_mesh_changes_nothing_but_rounding(shape):
  tokens, log_probs, _, value, _, gradients = step(shape)
  one = step((1, 1, 1))
  np.testing.assert_array_equal(tokens, one[0])
  np.testing.assert_allclose(log_probs, one[1], atol=1e-5)
  np.testing.assert_allclose(value, one[3], atol=1e-6)
  wanted = dict(trees.items(one[5]))
  for path, gradient in trees.items(gradients):
    np.testing.assert_allclose(gradient, wanted[path], atol=1e-5 * max(1, np.abs(wanted[path]).max()), err_msg=path)

"""Memory of an update: no gradient of a frozen weight, no second state, and one prefix per group.

Read from compiled programs; nothing runs.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding, trees
from uae_jax.layers import lora
from uae_jax.models.language import LanguageConfig, LanguageModel
from uae_jax.models.mmdit import MMDiT, MMDiTConfig
from uae_jax.options import OptimizerOptions, UpdateOptions
from uae_jax.rollouts.captions import Prefix, caption_hidden, token_log_probs
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.rl.update import run_updates
from uae_jax.training.state import create

LANGUAGE = LanguageConfig(
  vocab_size=64,
  width=256,
  depth=6,
  num_heads=4,
  num_kv_heads=2,
  head_width=64,
  mlp_width=512,
  mrope_sections=(8, 12, 12),
)
DECODER = MMDiTConfig(
  depth=6, num_heads=4, head_width=64, patch=2, context_width=64, pooled_width=16, pos_embed_max_size=4, sample_size=8
)
OPTIMIZER = make_optimizer(OptimizerOptions(learning_rate=1e-3), 10)


def with_adapters(make):
  """(graphdef, abstract parameters) of a model with adapters of rank 2."""

  def build():
    model = make()
    lora.attach(model, lora.LoRA(2, 2.0, targets="layers/"), rngs=nnx.Rngs(1))
    return model

  return sharding.abstract_model(build, sharding.make_mesh(devices=jax.devices()[:1]))


def tokens(batch, rollouts, length):
  return jax.ShapeDtypeStruct((batch, rollouts, length), jnp.int32)


def caption_loss(model, tokens, prefix_length=4):
  """Mean log-probability of captions after a prefix of a given number of slots."""
  batch = tokens.shape[0]
  positions = jnp.broadcast_to(jnp.arange(prefix_length), (3, batch, prefix_length))
  embeddings = model.embed(jnp.zeros((batch, prefix_length), jnp.int32))
  hidden, cache = model.prefill(embeddings, positions, jnp.ones((batch, prefix_length), bool))
  prefix = Prefix(cache, hidden[:, -1], jnp.full((batch,), prefix_length))
  return jnp.mean(token_log_probs(model, caption_hidden(model, prefix, tokens)[0], tokens)[0])


def velocity_loss(model, latents):
  context, pooled = jnp.ones((len(latents), 2, DECODER.context_width)), jnp.ones((len(latents), DECODER.pooled_width))
  return jnp.mean(jnp.square(model(latents, jnp.full((len(latents),), 500.0), context, pooled)))


NETS = {
  "captioner": (lambda: LanguageModel(LANGUAGE, rngs=nnx.Rngs(0)), caption_loss, tokens(1, 2, 4)),
  "decoder": (
    lambda: MMDiT(DECODER, rngs=nnx.Rngs(0)),
    velocity_loss,
    jax.ShapeDtypeStruct((1, 4, 4, 16), jnp.float32),
  ),
}


def compiled_update(net, is_trainable):
  """(state, compiled update of the leaves that `is_trainable` selects), without any computation."""
  make, loss, batch = NETS[net]
  graphdef, params = with_adapters(make)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(lambda params, key: create(params, is_trainable, OPTIMIZER, key, has_ema=False), params, key)

  def objective(params, microbatch, _):
    return (loss(nnx.merge(graphdef, params), microbatch), jnp.float32(1.0)), {}

  def update(state, batch):
    return run_updates(state, batch, objective, UpdateOptions(), OPTIMIZER)

  return state, jax.jit(update, donate_argnums=0).lower(state, batch).compile().memory_analysis()


@pytest.mark.parametrize("net", NETS)
def test_an_update_of_adapters_has_no_gradient_of_a_frozen_weight(net):
  state, memory = compiled_update(net, lora.is_adapter)
  frozen, moving = trees.size_bytes(state.frozen), trees.size_bytes(state.trainable)
  # The layers are scanned: the weights of one layer, a sixth of them, may be sliced or transposed.
  assert memory.temp_size_in_bytes < frozen / 2
  # Adapters and both moments are updated in place; the frozen weights are returned unchanged.
  assert memory.alias_size_in_bytes > 3 * moving + frozen


def test_a_gradient_of_the_weights_would_be_seen():
  state, memory = compiled_update("captioner", lambda path: "layers/" in path)
  assert memory.temp_size_in_bytes > trees.size_bytes(state.trainable) / 2


def test_the_memory_of_a_group_grows_by_its_captions_not_by_its_prefix():
  make = NETS["captioner"][0]
  graphdef, params = with_adapters(make)
  trainable, frozen = trees.split(params, lora.is_adapter)

  def temporaries(batch, rollouts):
    def loss(trainable, frozen, tokens):
      return caption_loss(nnx.merge(graphdef, trees.merge(trainable, frozen)), tokens, prefix_length=128)

    program = jax.jit(jax.grad(loss)).lower(trainable, frozen, tokens(batch, rollouts, 8))
    return program.compile().memory_analysis().temp_size_in_bytes

  alone, group, repeated = temporaries(1, 1), temporaries(1, 8), temporaries(8, 1)
  # 8 (128 + 8) positions if repeated, 128 + 8 * 8 if shared.
  assert repeated > 4 * alone
  assert group < repeated / 3


def test_parts_of_an_objective_are_held_one_at_a_time_and_have_its_gradient():
  """Gradients of single window steps add up to the gradient of the whole, which stores the activations of all steps."""
  window, rows = 4, 256
  key = jax.random.key(0)
  latents = jax.random.normal(key, (1, window, rows, 16))
  weights = {"first": 0.1 * jax.random.normal(key, (16, 64)), "more": 0.1 * jax.random.normal(key, (4, 64, 64))}

  def squares(params, latents):
    hidden = latents @ params["first"]
    for weight in params["more"]:
      hidden = jnp.tanh(hidden @ weight)
    return (jnp.sum(jnp.square(hidden)), jnp.float32(hidden.size)), {}

  def part(params, latents, known):
    return squares(params, latents[:, known.part])

  def program(objective, num_parts):
    def update(state, latents):
      return run_updates(state, latents, objective, UpdateOptions(), OPTIMIZER, num_parts=num_parts)

    state = create(weights, lambda path: True, OPTIMIZER, key, has_ema=False)
    compiled = jax.jit(update).lower(state, latents).compile()
    return compiled(state, latents), compiled.memory_analysis().temp_size_in_bytes

  (whole, metrics), all_held = program(lambda params, latents, _: squares(params, latents), 1)
  (parts, part_metrics), one_held = program(part, window)
  assert all_held > 2 * one_held
  for name in metrics:
    np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts.trainable, whole.trainable)

"""Compiled programs gather one layer at a time: no gather exceeds one weight, and stacks are gathered in loops."""

import types

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
import pytest

from uae_jax import sharding, trees
from uae_jax.layers import lora
from uae_jax.models.language import LanguageConfig, LanguageModel, PrefixCache
from uae_jax.models.mmdit import MMDiT, MMDiTConfig
from uae_jax.options import ImageObjective, OptimizerOptions, UnderstandingForGenerationOptions, UpdateOptions
from uae_jax.planning.collectives import collectives, summary
from uae_jax.rollouts import captions
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.rl import forward_policy, sde_policy
from uae_jax.training.rl.policy import Fields
from uae_jax.training.rl.update import run_updates
from uae_jax.training.state import create

CONFIG = MMDiTConfig(
  depth=5, num_heads=4, head_width=16, patch=2, context_width=64, pooled_width=32, pos_embed_max_size=8, remat="full"
)
LAYERS = CONFIG.depth - 1


class Adapted(nnx.Module):
  """A decoder with adapters in every layer."""

  def __init__(self, rngs: nnx.Rngs):
    self.net = MMDiT(CONFIG, rngs=rngs)
    lora.attach(self.net, lora.LoRA(8, 8.0), rngs=rngs)


@pytest.fixture(scope="module")
def world():
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  graphdef, params = sharding.abstract_model(lambda: Adapted(nnx.Rngs(0)), mesh)
  place = sharding.batch_sharding(mesh)
  shapes = ((8, 8, 8, 16), (8,), (8, 6, 64), (8, 32))
  return mesh, graphdef, params, [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]


def compiled(world, *, gathers_first: bool):
  """Compiles the gradient of the adapters, as in RL; for the negative control only the value."""
  mesh, graphdef, params, inputs = world
  trainable, frozen = trees.split(params, lora.is_adapter)

  def loss(trainable, frozen, *inputs):
    model = nnx.merge(graphdef, trees.merge(trainable, frozen))
    model = sharding.gathered(model) if gathers_first else model
    return jnp.mean(jnp.square(model.net(*inputs)))

  with jax.set_mesh(mesh):
    places = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    function = loss if gathers_first else jax.grad(loss)
    jitted = jax.jit(function, out_shardings=None if gathers_first else places)
    return jitted.lower(trainable, frozen, *inputs).compile().as_text()


def bytes_of(params, is_stacked: bool) -> list[int]:
  """Bytes of every unsharded weight; of stacked weights, one layer."""
  leaves = [leaf for path, leaf in trees.items(params) if path.startswith("net/layers/") == is_stacked]
  return [leaf.size * 4 // (leaf.shape[0] if is_stacked else 1) for leaf in leaves]


def test_one_layer_at_a_time_is_whole(world):
  found = [item for item in collectives(compiled(world, gathers_first=False)) if item.kind == "all-gather"]
  largest = max(bytes_of(world[2], is_stacked=True))
  in_loops = [item for item in found if item.is_in_loop]
  assert in_loops and max(item.bytes for item in in_loops) <= largest
  assert {item.times for item in in_loops} == {LAYERS}
  outside = [item for item in found if not item.is_in_loop]
  # Gathers of the last block and the outer layers; a stack of four layers would exceed each of them.
  assert max(item.bytes for item in outside) <= max(bytes_of(world[2], is_stacked=False))


def test_a_stack_gathered_whole_is_found(world):
  """Negative control: the check above can fail."""
  found = collectives(compiled(world, gathers_first=True))
  stack = LAYERS * max(bytes_of(world[2], is_stacked=True))
  assert max(item.bytes for item in found if item.kind == "all-gather" and not item.is_in_loop) >= stack // 2


def loops(jaxpr):
  """Every scan in a jaxpr, including nested ones."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from loops(inner)


@pytest.mark.parametrize("make_policy, objective", [
  (sde_policy.make_policy, ImageObjective()),
  (forward_policy.make_policy, ImageObjective(loss="nft")),
])  # fmt: skip
def test_an_update_of_adapters_keeps_no_frozen_weights(world, make_policy, objective):
  """Not even gathered ones: JAX hoists them out of a differentiated loop over layers despite rematerialization."""
  mesh, graphdef, params, (_, _, context, pooled) = world
  options = UnderstandingForGenerationOptions(num_rollouts=8, sampler_steps=5, window_range=(0, 2), noising_points=2)
  policy = make_policy(options, objective)
  optimizer = make_optimizer(OptimizerOptions(learning_rate=1e-3), 10)

  def objective_of_part(params, record, known):
    def velocity(latents, sigma):
      net = nnx.merge(graphdef, params).net
      return net(latents, jnp.broadcast_to(1000 * sigma, len(latents)), jnp.ones(context.shape), jnp.ones(pooled.shape))

    return policy.loss(Fields(velocity, reference=None), record, known.part, jnp.ones((1, 8)), known.old)

  def update(params, key):
    state = create(params, lora.is_adapter, optimizer, key, has_ema=False)
    _, record = policy.sample(lambda repeat: lambda x, _: x, jnp.zeros((1, 8, 8, 16)), key, 0)
    options = UpdateOptions()
    return run_updates(state, record, objective_of_part, options, optimizer, num_parts=policy.num_points)

  with jax.set_mesh(mesh):
    found = list(loops(jax.make_jaxpr(update)(params, jax.random.key(0)).jaxpr))
  frozen = {leaf.shape for path, leaf in trees.items(params) if "/layers/" in path and path.endswith("kernel")}
  assert not frozen & {out.aval.shape[-3:] for loop in found for out in loop.outvars}
  assert sum(loop.params["length"] == LAYERS for loop in found) == 2  # forward and backward


def test_a_summary_adds_what_loops_repeat():
  text = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[4,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}

%limit (p: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(38)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%limit, body=%body
  %r = (bf16[2], bf16[6]) all-reduce-start(%a, %b), channel_id=2, to_apply=%sum
}
"""
  assert summary(collectives(text)) == {
    "all-gather": {"count": 1, "in_loops": 1, "largest_bytes": 128, "total_bytes": 38 * 128},
    "all-reduce": {"count": 1, "in_loops": 0, "largest_bytes": 12, "total_bytes": 12},
  }


def test_decoding_gathers_its_weights_once():
  """Weights are gathered before the loop over tokens; inside it, nothing as large as a weight is transferred."""
  config = LanguageConfig(
    vocab_size=64,
    width=64,
    depth=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    mlp_width=96,
    mrope_sections=(2, 3, 3),
    ties_embeddings=True,
  )
  mesh = sharding.make_mesh(fsdp=8)
  graphdef, params = sharding.abstract_model(lambda: LanguageModel(config, rngs=nnx.Rngs(0)), mesh)

  def array(*shape, dtype=jnp.float32, axis=0):
    spec = jax.sharding.PartitionSpec(*(None,) * axis, sharding.RULES["batch"])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  keys = array(config.depth, 8, 5, 2, 16, axis=1)
  cache = PrefixCache(keys, keys, array(8, 5, dtype=bool))
  prefix = captions.Prefix(cache, array(8, config.width), array(8, dtype=jnp.int32))
  prompts = types.SimpleNamespace(end=(1,), pad=0, vocabulary=lambda size: jnp.ones(size, bool))

  def decode(params, prefix):
    language, key = nnx.merge(graphdef, params), jax.random.key(0)
    options = dict(num_rollouts=2, max_tokens=4, temperature=1.0)
    return captions.sample_captions(language, prompts, prefix, key, **options).tokens

  with jax.set_mesh(mesh):
    found = collectives(jax.jit(decode).lower(params, prefix).compile().as_text())
  largest = config.depth * config.width * config.mlp_width * 4
  assert max(item.bytes for item in found if not item.is_in_loop) == largest
  assert all(item.bytes <= 64 for item in found if item.is_in_loop)

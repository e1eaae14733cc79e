"""MMDiT equals diffusers' SD3Transformer2DModel (SD3.5 large and medium): outputs, gradients, names, shapes, counts."""

import dataclasses
import functools

from diffusers import SD3Transformer2DModel
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax import sharding, trees
from uae_jax.layers import lora
from uae_jax.models.mmdit import MMDiT, MMDiTConfig, inputs_spec
from uae_jax.weights import mmdit as weights
from uae_jax.weights.table import WeightError, dump, load, specs

SMALL = {
  "sample_size": 16,
  "patch_size": 2,
  "in_channels": 16,
  "num_layers": 3,
  "attention_head_dim": 16,
  "num_attention_heads": 2,
  "joint_attention_dim": 24,
  "caption_projection_dim": 32,
  "pooled_projection_dim": 20,
  "out_channels": 16,
  "pos_embed_max_size": 11,
  "dual_attention_layers": (),
  "qk_norm": "rms_norm",
}
KINDS = {
  "large": {},
  "medium": {"num_layers": 4, "dual_attention_layers": (0, 1), "patch_size": 4, "sample_size": 32},
  "dual_throughout": {"num_layers": 2, "dual_attention_layers": (0, 1)},
  "sd3": {"qk_norm": None, "num_layers": 2},
}
PUBLISHED = {
  "sd35_large": {
    "sample_size": 128,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
  },
  "sd35_medium": {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
  },
}


@dataclasses.dataclass
class Pair:
  """A random torch model and our model with the same weights."""

  reference: SD3Transformer2DModel
  tensors: dict
  config: MMDiTConfig
  graphdef: nnx.GraphDef
  shapes: dict
  params: dict

  def ours(self, params, latents, timesteps, context, pooled, context_mask=None):
    return nnx.merge(self.graphdef, params)(latents, timesteps, context, pooled, context_mask)


def build(config: MMDiTConfig, mesh=None):
  return sharding.abstract_model(lambda: MMDiT(config, rngs=nnx.Rngs(0)), mesh or sharding.make_mesh(8))


@functools.cache
def make_pair(kind: str) -> Pair:
  torch.set_num_threads(1)
  torch.manual_seed(0)
  settings = SMALL | KINDS[kind]
  reference = SD3Transformer2DModel(**settings).eval()
  with torch.no_grad():
    for name, parameter in reference.named_parameters():
      noise = torch.randn_like(parameter)
      is_norm = "norm_" in name and parameter.ndim == 1 and name.endswith("weight")
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
      parameter.copy_(1 + 0.3 * noise if is_norm else noise / fan_in**0.5)
  tensors = {name: value.numpy().copy() for name, value in reference.state_dict().items()}
  config = MMDiTConfig.from_huggingface(settings)
  graphdef, shapes = build(config)
  params = load(tensors, weights.table(config), shapes)
  return Pair(reference, tensors, config, graphdef, shapes, params)


@pytest.fixture(params=KINDS)
def pair(request):
  return make_pair(request.param)


@pytest.fixture
def medium():
  """The variant with every component: both stacks and the last block."""
  return make_pair("medium")


def example(config: MMDiTConfig, height: int, width: int, tokens: int = 7, batch: int = 2):
  """Latents of `height` x `width` patches; timesteps are those at which the float32 sinusoid is accurate."""
  rng = np.random.default_rng(1)
  latents = rng.normal(size=(batch, height * config.patch, width * config.patch, config.in_channels))
  context = rng.normal(size=(batch, tokens, config.context_width))
  pooled = rng.normal(size=(batch, config.pooled_width))
  return tuple(x.astype(np.float32) for x in (latents, np.linspace(0.4, 9.0, batch), context, pooled))


def nchw(x):
  return torch.tensor(np.transpose(np.asarray(x), (0, 3, 1, 2)))


def theirs(reference, latents, timesteps, context, pooled):
  out = reference(latents, context, pooled, timesteps, return_dict=False)[0]
  return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("patches", [(4, 4), (3, 5), (11, 2)])
def test_output(pair, patches):
  latents, timesteps, context, pooled = example(pair.config, *patches)
  with torch.no_grad():
    want = theirs(pair.reference, nchw(latents), *map(torch.tensor, (timesteps, context, pooled)))
  out = jax.jit(pair.ours)(pair.params, latents, timesteps, context, pooled)
  assert want.std() > 0.3
  np.testing.assert_allclose(out, want, atol=2e-5)


def test_output_at_large_timesteps(medium):
  latents, _, context, pooled = example(medium.config, 4, 4)
  timesteps = np.array([1000.0, 637.25], np.float32)
  with torch.no_grad():
    want = theirs(medium.reference, nchw(latents), *map(torch.tensor, (timesteps, context, pooled)))
  # An angle of 1000 radians has a rounding error of 6e-5 in float32, in both implementations.
  np.testing.assert_allclose(medium.ours(medium.params, latents, timesteps, context, pooled), want, atol=2e-4)


def test_gradients(pair):
  latents, timesteps, context, pooled = example(pair.config, 3, 4)
  target = np.random.default_rng(2).normal(size=latents.shape).astype(np.float32)

  inputs = [nchw(latents), torch.tensor(context), torch.tensor(pooled)]
  for x in inputs:
    x.requires_grad_()
  pair.reference.zero_grad()
  want = theirs(pair.reference, inputs[0], torch.tensor(timesteps), inputs[1], inputs[2])
  torch.sum(want * torch.tensor(target)).backward()

  def loss(params, latents, context, pooled):
    return jnp.sum(pair.ours(params, latents, timesteps, context, pooled) * target)

  grads, *grad_inputs = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(pair.params, latents, context, pooled)
  expected = [inputs[0].grad.permute(0, 2, 3, 1), inputs[1].grad, inputs[2].grad]
  for got, want in zip(grad_inputs, expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5 * float(want.abs().max()))
  found = dump(jax.tree.map(np.asarray, grads), weights.table(pair.config))
  for name, parameter in pair.reference.named_parameters():
    scale = max(1e-2, float(parameter.grad.abs().max()))
    np.testing.assert_allclose(found[name], parameter.grad, atol=5e-5 * scale, err_msg=name)


def test_a_mask_equals_leaving_the_padding_out(medium):
  latents, timesteps, context, pooled = example(medium.config, 3, 4, tokens=7)
  mask = np.arange(7)[None] < np.array([[5], [5]])
  with torch.no_grad():
    want = theirs(medium.reference, nchw(latents), *map(torch.tensor, (timesteps, context[:, :5], pooled)))
  np.testing.assert_allclose(medium.ours(medium.params, latents, timesteps, context, pooled, mask), want, atol=2e-5)
  # Rows of unequal length: each equals its own truncation, whatever the padding contains.
  mask[1, 3:] = False
  out = medium.ours(medium.params, latents, timesteps, context, pooled, mask)
  noisy = np.where(mask[..., None], context, 100.0).astype(np.float32)
  np.testing.assert_allclose(medium.ours(medium.params, latents, timesteps, noisy, pooled, mask), out, atol=1e-5)
  alone = medium.ours(medium.params, latents[1:], timesteps[1:], context[1:, :3], pooled[1:])
  np.testing.assert_allclose(out[1:], alone, atol=2e-5)


def test_scan_unroll_and_remat_are_equal(medium):
  arguments = example(medium.config, 3, 4)

  def run(config):
    graphdef, _ = build(config)

    def loss(params):
      return jnp.sum(nnx.merge(graphdef, params)(*arguments) ** 2)

    return jax.jit(jax.value_and_grad(loss))(medium.params)

  value, grads = run(medium.config)
  other_value, other_grads = run(dataclasses.replace(medium.config, remat="full", unroll=True))
  np.testing.assert_allclose(other_value, value, rtol=1e-6)
  for (path, want), (_, got) in zip(trees.items(grads), trees.items(other_grads), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())), err_msg=path)


def test_bfloat16_rounds_no_more_than_torch(medium):
  latents, _, context, pooled = example(medium.config, 4, 4, batch=8)
  timesteps = np.linspace(5, 995, 8, dtype=np.float32)
  exact = np.asarray(medium.ours(medium.params, latents, timesteps, context, pooled))
  half = trees.cast(medium.params, jnp.bfloat16)
  half_inputs = [jnp.asarray(x, jnp.bfloat16) for x in (latents, context, pooled)]
  out = jax.jit(medium.ours)(half, half_inputs[0], timesteps, *half_inputs[1:])
  assert out.dtype == jnp.bfloat16
  reference = SD3Transformer2DModel(**medium.reference.config).to(torch.bfloat16).eval()
  reference.load_state_dict({name: torch.tensor(value) for name, value in medium.tensors.items()})
  with torch.no_grad():
    context, pooled = torch.tensor(context).bfloat16(), torch.tensor(pooled).bfloat16()
    want = theirs(reference, nchw(latents).bfloat16(), torch.tensor(timesteps), context, pooled)
  error, allowed = (float(np.std(np.asarray(x, np.float32) - exact)) for x in (out, want.float()))
  assert error <= 1.5 * allowed


def test_a_fresh_network_outputs_zero_and_has_the_position_table_of_the_checkpoint(medium):
  with nnx.use_eager_sharding(False):
    model = MMDiT(medium.config, rngs=nnx.Rngs(0))
  assert not np.any(model(*example(medium.config, 3, 4)))
  np.testing.assert_allclose(model.position_table[...], medium.params["position_table"], atol=1e-6)


def test_round_trip_is_exact(pair):
  back = dump(pair.params, weights.table(pair.config))
  assert back.keys() == pair.tensors.keys()
  assert all(np.array_equal(back[name], pair.tensors[name]) for name in back)


def test_a_missing_and_an_unknown_tensor_raise(medium):
  table = weights.table(medium.config)
  name = "transformer_blocks.0.attn.to_add_out.bias"
  with pytest.raises(WeightError, match=f"missing {name}"):
    load({k: v for k, v in medium.tensors.items() if k != name}, table, medium.shapes)
  with pytest.raises(WeightError, match="unexpected transformer_blocks.9.attn.to_q.bias"):
    load(medium.tensors | {"transformer_blocks.9.attn.to_q.bias": np.zeros(32)}, table, medium.shapes)


def test_adapters_take_the_names_of_peft(medium):
  """Every adapted layer, including the convolution, equals a PEFT model with the dumped tensors."""
  peft = pytest.importorskip("peft")
  settings = lora.LoRA(rank=3, alpha=6.0)
  with nnx.use_eager_sharding(False):
    model = MMDiT(medium.config, rngs=nnx.Rngs(0))
    lora.attach(model, settings, rngs=nnx.Rngs(1))
  graphdef, state = nnx.split(model)
  shapes, _ = trees.split(nnx.to_pure_dict(state), lora.is_adapter)
  rng = np.random.default_rng(3)
  adapters = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)
  table = weights.adapter_table(medium.config, settings)
  tensors = dump(adapters, table)
  restored = load(tensors, table, shapes)
  assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (restored, adapters)), strict=True))
  assert sorted(weights.adapter_targets(medium.config, tensors)[2:-2].split("|")) == sorted(
    {path.rsplit("/", 1)[0] for path, _ in trees.items(adapters)}
  )

  reference = SD3Transformer2DModel(**medium.reference.config).eval()
  reference.load_state_dict({name: torch.tensor(value) for name, value in medium.tensors.items()})
  modules = sorted({name.removeprefix(weights.PEFT).rsplit(".lora_", 1)[0] for name in tensors})
  wrapped = peft.get_peft_model(reference, peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules)).eval()
  result = peft.set_peft_model_state_dict(wrapped, {name: torch.tensor(value) for name, value in tensors.items()})
  assert not result.unexpected_keys
  latents, timesteps, context, pooled = example(medium.config, 3, 4)
  with torch.no_grad():
    want = theirs(wrapped, nchw(latents), *map(torch.tensor, (timesteps, context, pooled)))
  out = nnx.merge(graphdef, trees.merge(medium.params, adapters))(latents, timesteps, context, pooled)
  np.testing.assert_allclose(out, want, atol=3e-5)


def test_adapter_targets_are_exactly_the_layers_of_the_file():
  config = MMDiTConfig.from_huggingface(SMALL | KINDS["medium"])
  blocks = [f"{weights.PEFT}transformer_blocks.{i}" for i in range(4)]
  assert weights.adapter_targets(config, [f"{blocks[3]}.attn.to_q.lora_A.weight"]) == "^(last/image/projections/query)$"
  assert weights.adapter_targets(config, [f"{blocks[2]}.ff.net.2.lora_A.weight"]) == "^(layers/image/mlp_out)$"
  names = [f"{blocks[0]}.attn2.to_k.lora_A.weight", f"{weights.PEFT}pos_embed.proj.lora_A.weight"]
  assert weights.adapter_targets(config, names) == "^(patch_embed|dual_layers/dual_projections/key)$"


@pytest.mark.parametrize("name, parameters", [("sd35_large", 8_056_627_520), ("sd35_medium", 2_243_171_520)])
def test_full_size(name, parameters):
  """The tensors equal those of the published class in names, counts and shapes, on a mesh that uses every axis."""
  config = getattr(MMDiTConfig, name)()
  assert config == MMDiTConfig.from_huggingface(SMALL | {"dual_attention_layers": ()} | PUBLISHED[name])
  _, shapes = build(config, sharding.make_mesh(2, 2, 2))
  with torch.device("meta"):
    reference = SD3Transformer2DModel(**(SMALL | PUBLISHED[name]))
  state = reference.state_dict()
  assert sum(x.numel() for x in reference.parameters()) == parameters
  table_size = state["pos_embed.pos_embed"].numel()
  assert trees.count(shapes) == parameters + table_size

  names = {name: spec.shape for name, spec in specs(weights.table(config), shapes).items()}
  assert names == {name: tuple(value.shape) for name, value in state.items()}
  for path, leaf in trees.items(shapes):
    assert leaf.sharding.shard_shape(leaf.shape), path


def test_what_does_not_fit_is_refused(medium):
  model = nnx.merge(medium.graphdef, medium.params)
  latents, timesteps, context, pooled = example(medium.config, 3, 4)
  with pytest.raises(ValueError, match="do not divide"):
    model(latents[:, :-1], timesteps, context, pooled)
  with pytest.raises(ValueError, match="pos_embed_max_size"):
    model(*example(medium.config, 12, 4))
  with pytest.raises(ValueError, match="dual_attention_layers must be the first"):
    MMDiTConfig.from_huggingface(SMALL | {"dual_attention_layers": (1,)})
  with pytest.raises(ValueError, match="caption_projection_dim"):
    MMDiTConfig.from_huggingface(SMALL | {"caption_projection_dim": 40})


def test_inputs_spec_is_what_the_model_takes(medium):
  spec = inputs_spec(medium.config, batch=2, height=8, width=12, tokens=5, dtype=jnp.bfloat16)
  out = jax.eval_shape(lambda params, spec: medium.ours(params, **spec), medium.params, spec)
  assert out.shape == (2, 8, 12, 16) and out.dtype == jnp.bfloat16

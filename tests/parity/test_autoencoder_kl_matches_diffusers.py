"""AutoencoderKL equals diffusers' AutoencoderKL: both directions, gradients, names, shapes and counts."""

import dataclasses
import functools

from diffusers import AutoencoderKL as TorchAutoencoderKL
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax import sharding, trees
from uae_jax.layers.conv import GroupNorm
from uae_jax.models.vae import AutoencoderKL, AutoencoderKLConfig, inputs_spec
from uae_jax.weights import vae as weights
from uae_jax.weights.table import WeightError, dump, load

SMALL = {
  "in_channels": 3,
  "out_channels": 3,
  "latent_channels": 16,
  "block_out_channels": (8, 16, 16),
  "down_block_types": ("DownEncoderBlock2D",) * 3,
  "up_block_types": ("UpDecoderBlock2D",) * 3,
  "layers_per_block": 2,
  "norm_num_groups": 4,
  "scaling_factor": 1.5305,
  "shift_factor": 0.0609,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
}
KINDS = {
  "attention": {},
  "shallow": {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
  },
}
PUBLISHED = {
  "block_out_channels": (128, 256, 512, 512),
  "down_block_types": ("DownEncoderBlock2D",) * 4,
  "up_block_types": ("UpDecoderBlock2D",) * 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
}


@dataclasses.dataclass
class Pair:
  """A random torch model and our model with the same weights."""

  reference: TorchAutoencoderKL
  tensors: dict
  config: AutoencoderKLConfig
  graphdef: nnx.GraphDef
  shapes: dict
  params: dict

  def encode(self, params, images):
    return nnx.merge(self.graphdef, params).encode(images)

  def decode(self, params, latents):
    return nnx.merge(self.graphdef, params).decode(latents)


def build(config: AutoencoderKLConfig, mesh=None):
  return sharding.abstract_model(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)), mesh or sharding.make_mesh(8))


@functools.cache
def make_pair(kind: str) -> Pair:
  torch.set_num_threads(1)
  torch.manual_seed(0)
  settings = SMALL | KINDS[kind]
  reference = TorchAutoencoderKL(**settings).eval()
  with torch.no_grad():
    for name, parameter in reference.named_parameters():
      noise = torch.randn_like(parameter)
      is_norm = "norm" in name and name.endswith("weight")
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
      parameter.copy_(1 + 0.3 * noise if is_norm else noise / fan_in**0.5)
  config = AutoencoderKLConfig.from_huggingface(settings)
  tensors = {name: value.numpy().copy() for name, value in reference.state_dict().items()}
  graphdef, shapes = build(config)
  params = load(tensors | weights.latent_statistics(config), weights.table(config), shapes)
  return Pair(reference, tensors, config, graphdef, shapes, params)


@pytest.fixture(params=KINDS)
def pair(request):
  return make_pair(request.param)


@pytest.fixture
def attention():
  return make_pair("attention")


def example(config: AutoencoderKLConfig, height: int = 24, width: int = 32):
  rng = np.random.default_rng(1)
  images = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
  factor = config.downsampling
  latents = rng.normal(size=(2, height // factor, width // factor, config.latent_channels)).astype(np.float32)
  return images, latents


def nchw(x):
  return torch.tensor(np.transpose(np.asarray(x), (0, 3, 1, 2)))


def nhwc(x):
  return x.permute(0, 2, 3, 1)


def unscale(pair, latents):
  return latents / pair.config.scaling_factor + pair.config.shift_factor


def test_encode(pair):
  images, _ = example(pair.config)
  with torch.no_grad():
    posterior = pair.reference.encode(nchw(images)).latent_dist
  mean, log_var = pair.encode(pair.params, images)
  np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=2e-5)
  np.testing.assert_allclose(log_var, nhwc(posterior.logvar), atol=2e-5)
  latents = nnx.merge(pair.graphdef, pair.params).to_latents(mean)
  np.testing.assert_allclose(latents, (nhwc(posterior.mean) - 0.0609) * 1.5305, atol=3e-5)


def test_log_variance_is_clamped(attention):
  params = trees.from_items(trees.items(attention.params))
  bias = params["encoder"]["conv_out"]["bias"].copy()
  bias[16], bias[17] = 100.0, -100.0
  params["encoder"]["conv_out"]["bias"] = bias
  _, log_var = attention.encode(params, example(attention.config)[0])
  assert np.all(log_var[..., 0] == 20) and np.all(log_var[..., 1] == -30)


def test_decode(pair):
  _, latents = example(pair.config)
  with torch.no_grad():
    want = pair.reference.decode(unscale(pair, nchw(latents))).sample
  np.testing.assert_allclose(pair.decode(pair.params, latents), nhwc(want), atol=2e-5)


def test_gradients(pair):
  images, latents = example(pair.config)
  rng = np.random.default_rng(2)
  target, weight = (rng.normal(size=x.shape).astype(np.float32) for x in (images, latents))
  image_input, latent_input = nchw(images).requires_grad_(), nchw(latents).requires_grad_()
  pair.reference.zero_grad()
  posterior = pair.reference.encode(image_input).latent_dist
  decoded = pair.reference.decode(unscale(pair, latent_input)).sample
  loss = torch.sum(decoded * nchw(target)) + torch.sum(nchw(weight) * (posterior.mean + posterior.logvar))
  loss.backward()

  def ours(params, images, latents):
    mean, log_var = pair.encode(params, images)
    return jnp.sum(pair.decode(params, latents) * target) + jnp.sum(weight * (mean + log_var))

  grads, *inputs = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(pair.params, images, latents)
  for got, want in zip(inputs, (image_input.grad, latent_input.grad), strict=True):
    np.testing.assert_allclose(got, nhwc(want), atol=2e-5 * float(want.abs().max()))
  found = dump(jax.tree.map(np.asarray, grads), weights.table(pair.config))
  for name, parameter in pair.reference.named_parameters():
    scale = max(1.0, float(parameter.grad.abs().max()))
    np.testing.assert_allclose(found[name], parameter.grad, atol=5e-5 * scale, err_msg=name)


def test_statistics_a_channel_need_no_new_trace(attention):
  """Measured scaling and shift replace the config's values in the tree; latents and decoding follow."""
  traces = []

  @jax.jit
  def there_and_back(params, mean):
    traces.append(None)
    model = nnx.merge(attention.graphdef, params)
    latents = model.to_latents(mean)
    return latents, model.decode(latents)

  _, mean = example(attention.config)
  _, image = there_and_back(attention.params, mean)
  rng = np.random.default_rng(4)
  scaling, shift = (rng.uniform(0.5, 2, 16).astype(np.float32) for _ in range(2))
  latents, same = there_and_back(attention.params | {"latent_scaling": scaling, "latent_shift": shift}, mean)
  np.testing.assert_allclose(latents, (mean - shift) * scaling, atol=1e-5)
  np.testing.assert_allclose(same, image, atol=2e-5)
  assert len(traces) == 1


def test_remat_is_equal():
  pair = make_pair("shallow")
  _, latents = example(pair.config)

  def run(config):
    graphdef, _ = build(config)

    def loss(params, latents):
      return jnp.sum(nnx.merge(graphdef, params).decode(latents) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(pair.params, latents)

  value, grads = run(pair.config)
  other_value, other_grads = run(dataclasses.replace(pair.config, remat="full"))
  np.testing.assert_allclose(other_value, value, rtol=1e-6)
  for want, got in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())))


def test_bfloat16_rounds_no_more_than_torch(attention):
  images, latents = example(attention.config)
  exact = [np.asarray(attention.encode(attention.params, images)[0])]
  exact.append(np.asarray(attention.decode(attention.params, latents)))
  half = trees.cast(attention.params, jnp.bfloat16)
  # The two buffers stay in float32, like the values of the config.
  half |= {name: attention.params[name] for name in ("latent_scaling", "latent_shift")}
  found = [attention.encode(half, jnp.asarray(images, jnp.bfloat16))[0]]
  found.append(attention.decode(half, jnp.asarray(latents, jnp.bfloat16)))
  reference = TorchAutoencoderKL(**attention.reference.config).to(torch.bfloat16).eval()
  reference.load_state_dict({name: torch.tensor(value) for name, value in attention.tensors.items()})
  with torch.no_grad():
    theirs = [nhwc(reference.encode(nchw(images).bfloat16()).latent_dist.mean)]
    theirs.append(nhwc(reference.decode(unscale(attention, nchw(latents).bfloat16())).sample))
  for want, ours, other in zip(exact, found, theirs, strict=True):
    assert ours.dtype == jnp.bfloat16
    error, allowed = (float(np.std(np.asarray(x, np.float32) - want)) for x in (ours, other.float()))
    assert error <= 1.5 * allowed


def test_group_norm_far_from_zero():
  """A mean of 1000 standard deviations costs no more precision than in torch."""
  rng = np.random.default_rng(5)
  x = (1000 + rng.normal(size=(2, 6, 5, 12))).astype(np.float32)
  with nnx.use_eager_sharding(False):
    norm = GroupNorm(12, 3)
  want = torch.nn.functional.group_norm(nchw(x).double(), 3, eps=1e-6)
  theirs = torch.nn.functional.group_norm(nchw(x), 3, eps=1e-6)
  error = np.abs(norm(jnp.asarray(x)) - nhwc(want).numpy()).max()
  assert error <= max(1e-3, 1.5 * float((theirs - want).abs().max()))


def test_round_trip_is_exact(pair):
  back = dump(pair.params, weights.table(pair.config))
  assert back.keys() == pair.tensors.keys() | {"scaling_factor", "shift_factor"}
  assert all(np.array_equal(back[name], pair.tensors[name]) for name in pair.tensors)
  assert np.all(back["scaling_factor"] == np.float32(1.5305)) and np.all(back["shift_factor"] == np.float32(0.0609))


def test_a_missing_and_an_unknown_tensor_raise(attention):
  table, tensors = weights.table(attention.config), attention.tensors | weights.latent_statistics(attention.config)
  name = "decoder.up_blocks.1.upsamplers.0.conv.weight"
  with pytest.raises(WeightError, match=f"missing {name}"):
    load({k: v for k, v in tensors.items() if k != name}, table, attention.shapes)
  with pytest.raises(WeightError, match="unexpected quant_conv.weight"):
    load(tensors | {"quant_conv.weight": np.zeros((32, 32, 1, 1))}, table, attention.shapes)


def test_full_size():
  """The tensors equal those of the published class in names, counts and shapes."""
  config = AutoencoderKLConfig.sd3()
  assert config == AutoencoderKLConfig.from_huggingface(SMALL | PUBLISHED)
  _, shapes = build(config, sharding.make_mesh(2, 2, 2))
  with torch.device("meta"):
    reference = TorchAutoencoderKL(**(SMALL | PUBLISHED))
  assert sum(x.numel() for x in reference.parameters()) == 83_819_683
  assert trees.count(shapes) == 83_819_683 + 2 * 16
  views = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
  names = {name: value.shape for name, value in dump(views, weights.table(config)).items()}
  statistics = {"scaling_factor": (16,), "shift_factor": (16,)}
  assert names == {name: tuple(value.shape) for name, value in reference.state_dict().items()} | statistics


def test_what_does_not_fit_is_refused(attention):
  with pytest.raises(ValueError, match="do not divide by 4"):
    attention.encode(attention.params, example(attention.config, 24, 30)[0])
  with pytest.raises(ValueError, match="norm_groups"):
    build(dataclasses.replace(attention.config, norm_groups=3))
  for change in ({"use_quant_conv": True}, {"latents_mean": [0.0] * 16}, {"act_fn": "relu"}):
    with pytest.raises(ValueError, match=next(iter(change))):
      AutoencoderKLConfig.from_huggingface(SMALL | change)


def test_inputs_spec_is_what_the_model_takes(attention):
  spec = inputs_spec(attention.config, batch=2, height=24, width=32)
  mean, _ = jax.eval_shape(attention.encode, attention.params, spec["images"])
  assert mean.shape == spec["latents"].shape
  assert jax.eval_shape(attention.decode, attention.params, spec["latents"]).shape == spec["images"].shape

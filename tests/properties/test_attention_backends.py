"""All attention backends that run here agree in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding
from uae_jax.layers import attention


def inputs(tokens: int, num_kv: int, batch: int = 2, heads: int = 4, width: int = 64):
  keys = jax.random.split(jax.random.key(tokens + num_kv), 3)
  shapes = [(batch, tokens, n, width) for n in (heads, num_kv, num_kv)]
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def value_and_gradients(function, arrays):
  def loss(*arrays):
    out = function(*arrays)
    return jnp.sum(jnp.sin(out)), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
  return [out, *gradients]


@pytest.mark.parametrize(
  ("tokens", "num_kv", "is_causal", "is_ragged"),
  [(256, 4, False, False), (333, 2, False, True), (300, 2, True, True)],
)
def test_splash_equals_xla(tokens, num_kv, is_causal, is_ragged):
  arrays = inputs(tokens, num_kv)
  mask = None
  if is_ragged:
    mask = (jnp.arange(tokens) < jnp.asarray([[tokens - 70], [tokens]]))[:, None, None]
  wanted = value_and_gradients(lambda *a: attention.attend(*a, mask=mask, is_causal=is_causal, backend="xla"), arrays)
  found = value_and_gradients(lambda *a: attention.splash(*a, mask=mask, is_causal=is_causal, interpret=True), arrays)
  for ours, theirs in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_splash_on_a_mesh_that_cuts_rows_and_heads():
  """With two key heads on four devices, each query head keeps its own key head."""
  arrays = inputs(256, 2, batch=2, heads=4)
  wanted = attention.attend(*arrays, backend="xla")
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=1, tensor=4)):
    found = jax.jit(lambda *a: attention.splash(*a, mask=None, is_causal=False, interpret=True))(*arrays)
  np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_the_platform_of_the_mesh_chooses(monkeypatch):
  def chosen(platform, tokens, batch=4, dtype=jnp.bfloat16, mask=None):
    mesh = sharding.make_mesh(data=2, fsdp=4).abstract_mesh
    device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    q = jax.ShapeDtypeStruct((batch, tokens, 4, 64), dtype)
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
      return attention.choose_backend(q, q, mask)

  long = attention.SPLASH_MIN_TOKENS
  assert chosen("tpu", long, batch=8) == "splash"
  assert chosen("tpu", long, batch=4) == "xla"  # the rows are not divisible by the mesh
  assert chosen("tpu", 64, batch=8) == "xla"
  assert chosen("tpu", long, batch=8, mask=jnp.ones((8, 1, long, long), bool)) == "xla"
  assert chosen("gpu", 64) == "cudnn"
  assert chosen("gpu", 64, dtype=jnp.float32) == "xla"
  assert chosen("gpu", 65) == "cudnn" and chosen("gpu", 64, mask=jnp.ones((4, 1, 1, 64), bool)) == "cudnn"
  assert chosen("gpu", 65, mask=jnp.ones((4, 1, 1, 65), bool)) == "xla"  # JAX has no gradient of it
  assert chosen("cpu", long, batch=8) == "xla"


def test_the_environment_overrides_once_per_process(monkeypatch):
  q = jax.ShapeDtypeStruct((4, 64, 4, 64), jnp.bfloat16)
  attention.backend_override.cache_clear()
  try:
    monkeypatch.setenv(attention.OVERRIDE, "splash")
    assert attention.choose_backend(q, q, None) == "splash"
    monkeypatch.setenv(attention.OVERRIDE, "xla")
    assert attention.choose_backend(q, q, None) == "splash"
  finally:
    attention.backend_override.cache_clear()
  monkeypatch.setenv(attention.OVERRIDE, "flash")
  with pytest.raises(ValueError, match="UAE_JAX_ATTENTION=flash: expected one of splash, cudnn, xla"):
    attention.choose_backend(q, q, None)


def test_blocks_pad_little():
  assert attention.padded_blocks(1536) == (512, 1536)
  assert attention.padded_blocks(1584) == (256, 1792)
  assert attention.padded_blocks(4608) == (512, 4608)

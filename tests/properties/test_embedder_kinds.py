"""Every registered kind of embedder can be built, planned and stored; listing the kinds does not import JAX."""

import dataclasses
import json
import re
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from uae_jax import sharding
from uae_jax.embedders import KINDS, registry
from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.embedders.kind import published
from uae_jax.planning.stage_programs import embedder_sizes
from uae_jax.small_world import sizes as small_world
from uae_jax.training import sizes


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_build_and_embed(kind):
  """Uses abstract arrays: nothing is allocated at full size."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for size in registry.find(kind).published.values():
    assert size.kind == kind
    graphdef, abstract = sharding.abstract_model(lambda s=size: s.build(nnx.Rngs(0)), mesh)
    network = EmbeddingNetwork(kind, graphdef, size.image_px, size.mean, size.std)
    images = jax.ShapeDtypeStruct((2, 40, 52, 3), jnp.float32)
    embeddings = jax.eval_shape(network, abstract, images)
    assert embeddings.shape[0] == 2 and embeddings.dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_sizes_of_every_kind(kind):
  """The folder name selects one of the published sizes; no file is read."""
  for name, size in registry.find(kind).published.items():
    assert embedder_sizes(kind, f"/absent/{name}", "uae_3b_sd35_large") == size
  first = next(iter(registry.find(kind).published.values()))
  assert embedder_sizes(kind, "weights/mine", "uae_3b_sd35_large") == first == published(kind)
  assert embedder_sizes(kind, sizes.FRESH, "uae_3b_sd35_large") == first


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_survive_model_json(kind, tmp_path):
  uae = sizes.UAEConfig.uae_3b_sd35_large(4, 4.0)
  wanted = sizes.Sizes(uae, {kind: published(kind)})
  sizes.write(tmp_path, wanted)
  assert sizes.read(tmp_path) == wanted


def test_the_small_world_has_its_own_sizes():
  for kind, network in small_world.embedders().items():
    size = sizes.fresh_embedder(kind, small_world.SMALL_WORLD)
    assert size == dataclasses.replace(published(kind), network=network, image_px=small_world.IMAGE_PX)
  with pytest.raises(ValueError, match=r"config\.embedders\.dinov3 = 'fresh'.*clip and dinov2"):
    sizes.fresh_embedder("dinov3", small_world.SMALL_WORLD)
  with pytest.raises(ValueError, match="'blip' is not known; expected one of clip, "):
    sizes.fresh_embedder("blip", small_world.SMALL_WORLD)


@pytest.mark.parametrize(
  ("kind", "field", "value", "message"),
  [
    ("siglip2", "layer_norm_eps", -1.0, "layer_norm_eps is -1.0, expected a positive number"),
    ("dinov3", "rope_theta", 0, "rope_theta is 0, expected a positive number"),
    ("dinov3", "num_register_tokens", "4", "num_register_tokens is '4', expected an integer from 0"),
    ("dinov3", "num_register_tokens", -1, "num_register_tokens is -1, expected an integer from 0"),
    ("dinov3", "use_gated_mlp", "no", "use_gated_mlp is 'no', expected true or false"),
    ("dinov3", "model_type", "dinov3_convnext", "model_type is 'dinov3_convnext', expected 'dinov3_vit'"),
    ("dinov2", "model_type", ["dinov2"], "expected 'dinov2' or 'dinov2_with_registers'"),
    ("clip", "model_type", "siglip", "model_type is 'siglip', expected 'clip' or"),
  ],
)
def test_a_field_out_of_range_is_named(tmp_path, kind, field, value, message):
  settings = {"vision_config": {field: value}} if kind == "siglip2" else {field: value}
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with pytest.raises(ValueError, match=f"config.json: .*{re.escape(message)}"):
    registry.find(kind).open(tmp_path)


def test_naming_the_kinds_imports_no_jax():
  heavy = ("jax", "jaxlib", "flax", "transformers", "numpy", "PIL")
  code = f"""
import sys
from uae_jax import embedders
from uae_jax.commands import bench
bench.parser()
print([name for name in {heavy!r} if name in sys.modules], list(embedders.KINDS))
"""
  loaded = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
  assert loaded == f"[] {list(KINDS)}"

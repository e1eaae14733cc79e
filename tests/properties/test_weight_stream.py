"""Streaming weights: the numbers of `load`, onto any mesh, one tensor at a time on the host; damaged files are
named.
"""

import json
import tracemalloc

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uae_jax import sharding, trees
from uae_jax.models.mmdit import MMDiT, MMDiTConfig
from uae_jax.weights import mmdit, table, tensor_files

CONFIG = MMDiTConfig(
  depth=8, num_heads=4, head_width=32, patch=2, context_width=64, pooled_width=32, pos_embed_max_size=8
)


def abstract(mesh):
  _, leaves = sharding.abstract_model(lambda: MMDiT(CONFIG, rngs=nnx.Rngs(0)), mesh)
  return leaves


def random_tensors():
  """A checkpoint of the model under the names of diffusers."""
  rng = np.random.default_rng(0)
  leaves = abstract(sharding.make_mesh(devices=jax.devices()[:1]))
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), leaves)
  return table.dump(params, mmdit.table(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """About one block a shard."""
  folder = tmp_path_factory.mktemp("weights")
  tensors = random_tensors()
  names = sorted(tensors, key=lambda name: (name.split(".")[1] if "blocks" in name else "", name))
  tensor_files.write_folder(folder, "model", {name: tensors[name] for name in names}, shard_bytes=2_000_000)
  return folder


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_stream_equals_load(folder, shape):
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  tensors, rows, leaves = tensor_files.open_folder(folder), mmdit.table(CONFIG), abstract(mesh)
  streamed = table.stream(tensors, rows, leaves)
  for (path, ours), (_, theirs) in zip(
    trees.items(streamed), trees.items(table.load(tensors, rows, leaves)), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(ours), theirs, err_msg=path)
  for path, leaf in trees.items(leaves):
    assert dict(trees.items(streamed))[path].sharding.is_equivalent_to(leaf.sharding, len(leaf.shape)), path


def test_the_host_holds_less_than_a_shard(folder):
  """Beside the destination: numpy's buffers are traced, those of the device are not."""
  shards = sorted(folder.glob("*.safetensors"))
  largest = max(file.stat().st_size for file in shards)
  leaves = abstract(sharding.make_mesh(devices=jax.devices()[:1]))
  tensors, rows = tensor_files.open_folder(folder), mmdit.table(CONFIG)
  # A leaf that is no stack may be the very buffer that was read: then it is the destination.
  single = sum(
    np.prod(leaves_of[path].shape) * 4
    for leaves_of in [dict(trees.items(leaves))]
    for path, (_, row) in table.expand(rows, leaves).items()
    if not table.is_stacked(row)
  )
  table.stream(tensors, rows, leaves)  # Compiles.
  tracemalloc.start()
  try:
    params = table.stream(tensors, rows, leaves)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert len(shards) > 5 and trees.size_bytes(params) > 5 * largest
  assert peak < single + 1.3 * largest


def test_files_are_those_of_the_safetensors_library(tmp_path):
  tensors = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asarray([1.5, -2], ml_dtypes.bfloat16),
    "c": np.zeros((0, 4), np.float16),
    "d": np.asarray(7, np.int64),
  }
  tensor_files.write(tmp_path / "ours.safetensors", tensors)
  save_file(tensors, tmp_path / "theirs.safetensors")
  theirs, ours = load_file(tmp_path / "ours.safetensors"), tensor_files.open_file(tmp_path / "theirs.safetensors")
  for name, value in tensors.items():
    for read in (theirs[name], ours[name]):
      assert read.dtype == value.dtype and read.shape == value.shape
      np.testing.assert_array_equal(read, value)
    assert tensor_files.spec_of(ours, name) == tensor_files.spec_of(tensors, name)


def test_shards_without_an_index(folder, tmp_path):
  for file in folder.glob("*.safetensors"):
    (tmp_path / file.name).write_bytes(file.read_bytes())
  assert set(tensor_files.open_folder(tmp_path)) == set(tensor_files.open_folder(folder))
  next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
  with pytest.raises(ValueError, match="shards, and no"):
    tensor_files.open_folder(tmp_path)


def test_torn_and_foreign_files_are_named(folder, tmp_path):
  whole = next(iter(sorted(folder.glob("*.safetensors")))).read_bytes()
  length = int.from_bytes(whole[:8], "little")
  for content in (whole[:-100], whole[:4], b"", b"\xff" * 64, whole[:8] + b"[" * length + whole[8 + length :]):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
      tensor_files.open_folder(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
  with pytest.raises(ValueError, match="gone.safetensors"):
    tensor_files.open_folder(tmp_path)


def test_all_problems_at_once():
  tensors = random_tensors()
  tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1]
  tensors["transformer_blocks.3.attn.to_q.bias"] = np.zeros(CONFIG.width, np.int32)
  tensors["stray"] = tensors.pop("context_embedder.weight")
  leaves = abstract(sharding.make_mesh(devices=jax.devices()[:1]))
  with pytest.raises(table.WeightError) as error:
    table.load(tensors, mmdit.table(CONFIG), leaves)
  found = "\n".join(sorted(error.value.problems))
  assert len(error.value.problems) == 4
  assert "missing context_embedder.weight" in found and "unexpected stray" in found
  assert "dtype int32" in found and "proj_out.bias: shape" in found

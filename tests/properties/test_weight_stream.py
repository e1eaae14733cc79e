"""Streaming weights: equal to `load`, onto any mesh, one tensor at a time on the host.

Damaged files are named in the error.
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
from uae_jax.weights import export, mmdit, moves, pooled, table, tensor_files

CONFIG = MMDiTConfig(
  depth=8, num_heads=4, head_width=32, patch=2, context_width=64, pooled_width=32, pos_embed_max_size=8
)


def abstract(mesh):
  _, leaves = sharding.abstract_model(lambda: MMDiT(CONFIG, rngs=nnx.Rngs(0)), mesh)
  return leaves


def random_tensors():
  """A checkpoint of the model with the names of diffusers."""
  rng = np.random.default_rng(0)
  leaves = abstract(sharding.make_mesh(devices=jax.devices()[:1]))
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), leaves)
  return table.dump(params, mmdit.table(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with about one block per shard."""
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
  """Apart from the destination: numpy's buffers are traced, those of the device are not."""
  shards = sorted(folder.glob("*.safetensors"))
  largest = max(file.stat().st_size for file in shards)
  leaves = abstract(sharding.make_mesh(devices=jax.devices()[:1]))
  tensors, rows = tensor_files.open_folder(folder), mmdit.table(CONFIG)
  # A leaf that is not stacked may be the buffer that was read; it is then the destination.
  single = sum(
    np.prod(leaves_of[path].shape) * 4
    for leaves_of in [dict(trees.items(leaves))]
    for match in table.expand(rows, leaves)
    if not match.is_stacked
    for path in match.paths
  )
  table.stream(tensors, rows, leaves)  # Compiles first.
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
  (tmp_path / "model.safetensors").unlink()
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


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_weights_that_are_not_finite_are_named(shape):
  tensors = random_tensors()
  names = ["proj_out.bias", "transformer_blocks.2.attn.to_q.weight"]
  for name, value in zip(names, (np.nan, -np.inf), strict=True):
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
  leaves = abstract(sharding.make_mesh(data=shape[0], fsdp=shape[1], devices=jax.devices()[: shape[0] * shape[1]]))
  for load in (table.load, table.stream):
    with pytest.raises(table.WeightError) as error:
      load(tensors, mmdit.table(CONFIG), leaves, source="dit")
    assert sorted(error.value.problems) == [f"{name} has values that are NaN or infinite" for name in names]


def test_a_pooled_embedding_that_is_not_finite_is_named(tmp_path):
  tensor_files.write(tmp_path / pooled.FILE, {pooled.NAME: np.array([0, np.nan], np.float32)})
  with pytest.raises(table.WeightError, match=f"{pooled.FILE}.*\n.*pooled has values that are NaN"):
    pooled.read(tmp_path)


FUSED = (
  table.Row("stack.{layer}.qkv", ("layers/q/kernel", "layers/k/kernel"), moves.TRANSPOSE),
  table.Row("one.{layer}.ab", ("nets/{layer}/a", "nets/{layer}/b"), axis=1),
  table.Row("single", ("x", "y", "z"), moves.Reshape((2, 2), (4,))),
)


def fused_params(mesh=None):
  """Leaves of `FUSED`: arrays, or shapes on a mesh."""
  shapes = {"layers/q/kernel": (3, 4, 2), "layers/k/kernel": (3, 4, 2), "x": (4,), "y": (4,), "z": (4,)}
  shapes |= {f"nets/{i}/{name}": (2, 3) for i in range(2) for name in "ab"}
  rng = np.random.default_rng(0)
  everywhere = None if mesh is None else sharding.replicated(mesh)

  def leaf(shape):
    if mesh is None:
      return rng.normal(size=shape).astype(np.float32)
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=everywhere)

  return trees.from_items((path, leaf(shape)) for path, shape in shapes.items())


def test_one_row_splits_a_fused_tensor_in_both_directions():
  params, abstract = fused_params(), fused_params(sharding.make_mesh(devices=jax.devices()[:1]))
  tensors = table.dump(params, FUSED)
  queries, keys = params["layers"]["q"]["kernel"], params["layers"]["k"]["kernel"]
  np.testing.assert_array_equal(tensors["stack.1.qkv"], np.concatenate([queries[1].T, keys[1].T]))
  np.testing.assert_array_equal(
    tensors["one.1.ab"], np.concatenate([params["nets"]["1"]["a"], params["nets"]["1"]["b"]], 1)
  )
  np.testing.assert_array_equal(tensors["single"], np.concatenate([params[name].reshape(2, 2) for name in "xyz"]))
  # `Dump` takes the leaves that rows name, so it does not support `{layer}` in `ours`.
  rows = (FUSED[0], FUSED[2])
  lazy = export.Dump(params, rows)
  assert {name: lazy.spec(name).shape for name in lazy} == {name: tensors[name].shape for name in lazy}
  specs = table.specs(FUSED, abstract)
  assert {name: spec.shape for name, spec in specs.items()} == {name: x.shape for name, x in tensors.items()}
  assert {name: specs[name] for name in lazy} == {name: lazy.spec(name) for name in lazy}
  for back in (table.load(tensors, FUSED, abstract), table.stream(tensors, FUSED, abstract)):
    for (path, ours), (other, want) in zip(trees.items(back), trees.items(params), strict=True):
      assert path == other
      np.testing.assert_array_equal(ours, want, err_msg=path)
  for name, value in lazy.items():
    np.testing.assert_array_equal(value, tensors[name])


def test_adapters_of_fused_kernels_are_merged():
  params, rng = fused_params(), np.random.default_rng(1)
  key = params["layers"]["k"]
  key |= {
    name: rng.normal(size=shape).astype(np.float32) for name, shape in (("lora_a", (3, 4, 1)), ("lora_b", (3, 1, 2)))
  }
  merged = export.Dump(params, FUSED[:1], merge_scale=0.5)
  want = key["kernel"][2] + 0.5 * key["lora_a"][2] @ key["lora_b"][2]
  np.testing.assert_allclose(merged["stack.2.qkv"][2:], want.T, atol=1e-6)
  np.testing.assert_array_equal(merged["stack.2.qkv"][:2], params["layers"]["q"]["kernel"][2].T)


def test_problems_of_fused_tensors_are_in_the_one_report():
  abstract = fused_params(sharding.make_mesh(devices=jax.devices()[:1]))
  tensors = table.dump(fused_params(), FUSED)
  tensors["single"] = tensors["single"][:-1]
  tensors["one.0.ab"] = tensors["one.0.ab"].astype(np.int32)
  tensors["stack.0.qkv"] = np.concatenate([tensors["stack.0.qkv"]] * 2)
  tensors["stack.2.q"] = tensors.pop("stack.2.qkv")
  problems = "\n".join(table.find_problems(tensors, FUSED, abstract))
  assert "single: shape (5, 2) does not split into 3 parts along axis 0" in problems
  assert "one.0.ab: dtype int32, nets/0/a wants" in problems and "one.0.ab: dtype int32, nets/0/b wants" in problems
  assert "stack.0.qkv: shape (8, 4) becomes (4, 4), layers/q/kernel wants (4, 2)" in problems
  assert "missing stack.2.qkv (for layers/q/kernel, shape (3, 4, 2), layers/k/kernel" in problems
  assert "unexpected stack.2.q, shape" in problems
  with pytest.raises(table.WeightError, match="filled by single and by other"):
    table.expand((*FUSED, table.Row("other", "y")), abstract)
  with pytest.raises(table.WeightError, match="table row other -> absent: the model has no such parameter"):
    table.expand((*FUSED[:2], table.Row("other", ("x", "y", "z", "absent"))), abstract)

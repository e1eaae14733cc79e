"""Rows shared by the weight tables of image and text towers."""

from collections.abc import Iterable, Iterator, Mapping

from uae_jax.models.vit import ViTConfig
from uae_jax.weights.moves import CONV, TRANSPOSE, Reshape, Then
from uae_jax.weights.table import Row, linear, norm


def patch_embed(theirs: str, patch: int, width: int, *, bias: bool) -> Iterator[Row]:
  """Rows of a patch embedding: a strided convolution in torch, a linear layer on flattened patches here."""
  reshape = Reshape((patch, patch, 3, width), (patch * patch * 3, width))
  yield Row(f"{theirs}.weight", "patch_embed/kernel", Then((CONV, reshape)))
  if bias:
    yield Row(f"{theirs}.bias", "patch_embed/bias")


def blocks(config: ViTConfig, theirs: str, names: Mapping[str, str]) -> Iterator[Row]:
  """Rows for every parameter of `models.vit.Encoder(config)`.

  Args:
    config: config of the tower.
    theirs: prefix of a block's tensor names, with `{layer}`.
    names: our name of a module in a block -> theirs; "attention" stands for a torch `MultiheadAttention` and replaces
      "query", "key", "value" and "out".
  """
  ours = "encoder/layers"
  for name in ("attention_norm", "mlp_norm"):
    yield from norm(f"{theirs}.{names[name]}", f"{ours}/{name}", bias=True)
  if "attention" in names:
    yield from multihead_attention(f"{theirs}.{names['attention']}", f"{ours}/attention")
  else:
    for name in ("query", "key", "value", "out"):
      bias = getattr(config, f"{name}_bias")
      yield from linear(f"{theirs}.{names[name]}", f"{ours}/attention/{name}", bias=bias)
  for name in ("gate", "up", "down") if config.gated_mlp else ("up", "down"):
    yield from linear(f"{theirs}.{names[name]}", f"{ours}/mlp/{name}", bias=config.mlp_bias)
  if config.layer_scale is not None:
    for name in ("attention_scale", "mlp_scale"):
      yield Row(f"{theirs}.{names[name]}", f"{ours}/{name}")


def multihead_attention(theirs: str, ours: str) -> Iterator[Row]:
  """Rows of an `Attention` with biases from torch's `MultiheadAttention`, which fuses query, key and value."""
  parts = tuple(f"{ours}/{name}" for name in ("query", "key", "value"))
  yield Row(f"{theirs}.in_proj_weight", tuple(f"{part}/kernel" for part in parts), TRANSPOSE)
  yield Row(f"{theirs}.in_proj_bias", tuple(f"{part}/bias" for part in parts))
  yield from linear(f"{theirs}.out_proj", f"{ours}/out")


def inside(prefix: str, rows: Iterable[Row]) -> Iterator[Row]:
  """Rows of a model that is the submodule `prefix` of a larger one."""
  return (row.inside(prefix) for row in rows)

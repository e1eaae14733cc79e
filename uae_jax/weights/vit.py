"""Rows that the tables of CLIP, DINOv2 and DINOv3 share."""

from collections.abc import Iterator, Mapping

from uae_jax.models.vit import ViTConfig
from uae_jax.weights.table import CONV, Reshape, Row, Then, linear, norm


def patch_embed(theirs: str, patch: int, width: int, *, bias: bool) -> Iterator[Row]:
  """A strided convolution there, a linear layer on flattened patches here."""
  reshape = Reshape((patch, patch, 3, width), (patch * patch * 3, width))
  yield Row(f"{theirs}.weight", "patch_embed/kernel", Then((CONV, reshape)))
  if bias:
    yield Row(f"{theirs}.bias", "patch_embed/bias")


def blocks(config: ViTConfig, theirs: str, names: Mapping[str, str]) -> Iterator[Row]:
  """Every parameter of `Encoder(config)`.

  Args:
    config: of the encoder.
    theirs: prefix with `{layer}`.
    names: our name of a module in a block -> theirs.
  """
  ours = "encoder/layers"
  for name in ("attention_norm", "mlp_norm"):
    yield from norm(f"{theirs}.{names[name]}", f"{ours}/{name}", bias=True)
  for name in ("query", "key", "value", "out"):
    bias = getattr(config, f"{name}_bias")
    yield from linear(f"{theirs}.{names[name]}", f"{ours}/attention/{name}", bias=bias)
  for name in ("gate", "up", "down") if config.gated_mlp else ("up", "down"):
    yield from linear(f"{theirs}.{names[name]}", f"{ours}/mlp/{name}", bias=config.mlp_bias)
  if config.layer_scale is not None:
    for name in ("attention_scale", "mlp_scale"):
      yield Row(f"{theirs}.{names[name]}", f"{ours}/{name}")


def inside(prefix: str, rows: Iterator[Row]) -> Iterator[Row]:
  """The rows of a model that is a part called `prefix` of a larger one."""
  for row in rows:
    yield Row(row.theirs, f"{prefix}/{row.ours}", row.move, row.first, row.count)

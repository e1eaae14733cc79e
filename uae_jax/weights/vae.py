"""Weight table for diffusers' AutoencoderKL, to and from `models.vae`.

Source: diffusers 0.42 autoencoder_kl.py, vae.py.

In diffusers, latent scaling and shift are numbers in `config.json`; here they are arrays in the tree. To load, add them
as tensors: `load(tensors | latent_statistics(config), table(config), abstract)`. The result of `dump` contains the same
two names, whose values belong in the config.
"""

from collections.abc import Collection, Iterator

import numpy as np

from uae_jax.models.vae import AutoencoderKLConfig
from uae_jax.weights.moves import CONV
from uae_jax.weights.table import Row, linear, norm
from uae_jax.weights.tensor_files import count_indices

IGNORED: dict[str, str] = {}


def latent_statistics(config: AutoencoderKLConfig) -> dict[str, np.ndarray]:
  """Scaling and shift of the config as arrays with one value per channel."""
  shape = (config.latent_channels,)
  return {
    "scaling_factor": np.full(shape, config.scaling_factor, np.float32),
    "shift_factor": np.full(shape, config.shift_factor, np.float32),
  }


def size_problems(config: AutoencoderKLConfig, tensors: Collection[str]) -> list[str]:
  """Numbers of levels and layers in a config that are not those of the tensors."""
  claims = (
    ("block_out_channels", len(config.block_channels), "encoder.down_blocks."),
    ("layers_per_block", config.layers_per_block, "encoder.down_blocks.0.resnets."),
  )
  return [
    f"{name} gives {claimed}, the tensors have {found} {prefix}*"
    for name, claimed, prefix in claims
    if claimed != (found := count_indices(tensors, prefix))
  ]


def table(config: AutoencoderKLConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `AutoencoderKL(config)`, and its two buffers."""
  rows = [Row("scaling_factor", "latent_scaling"), Row("shift_factor", "latent_shift")]
  channels = config.block_channels
  for side, levels, names, sampler in (
    ("encoder", channels, "down_blocks", "downsamplers"),
    ("decoder", channels[::-1], "up_blocks", "upsamplers"),
  ):
    rows += conv(f"{side}.conv_in", f"{side}/conv_in")
    rows += middle(config, side)
    rows += norm(f"{side}.conv_norm_out", f"{side}/norm_out", bias=True)
    rows += conv(f"{side}.conv_out", f"{side}/conv_out")
    depth = config.layers_per_block + (side == "decoder")
    for i, width in enumerate(levels):
      for j in range(depth):
        has_shortcut = j == 0 and levels[max(i - 1, 0)] != width
        rows += resnet(f"{side}.{names}.{i}.resnets.{j}", f"{side}/level{i}/resnet{j}", has_shortcut)
      if i < len(levels) - 1:
        rows += conv(f"{side}.{names}.{i}.{sampler}.0.conv", f"{side}/level{i}/resample")
  return tuple(rows)


def conv(theirs: str, ours: str) -> Iterator[Row]:
  yield Row(f"{theirs}.weight", f"{ours}/kernel", CONV)
  yield Row(f"{theirs}.bias", f"{ours}/bias")


def resnet(theirs: str, ours: str, has_shortcut: bool) -> Iterator[Row]:
  for i in (1, 2):
    yield from norm(f"{theirs}.norm{i}", f"{ours}/norm{i}", bias=True)
    yield from conv(f"{theirs}.conv{i}", f"{ours}/conv{i}")
  if has_shortcut:
    yield from conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut")


def middle(config: AutoencoderKLConfig, side: str) -> Iterator[Row]:
  theirs, ours = f"{side}.mid_block", f"{side}/middle"
  yield from resnet(f"{theirs}.resnets.0", f"{ours}/resnet1", False)
  yield from resnet(f"{theirs}.resnets.1", f"{ours}/resnet2", False)
  if config.mid_attention:
    yield from norm(f"{theirs}.attentions.0.group_norm", f"{ours}/attention/norm", bias=True)
    for their_name, our_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
      yield from linear(f"{theirs}.attentions.0.{their_name}", f"{ours}/attention/{our_name}")

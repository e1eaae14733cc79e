"""The connector: maps hidden states of the language model to context tokens of the decoder.

Source: UAE (arXiv 2509.09666), the `projector` of the official checkpoints: Linear, exact GELU, Linear.
"""

import dataclasses

from flax import nnx
import jax

from uae_jax.layers.lora import Linear


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """Widths of the connector.

  Attributes:
    in_width: width of the language model.
    hidden_width: width of the hidden layer.
    out_width: width of the decoder's context.
  """

  in_width: int
  hidden_width: int
  out_width: int

  @classmethod
  def uae(cls) -> "ConnectorConfig":
    """From Qwen2.5-VL-3B to SD3.5-large. Source: shapes of `projector.{0,2}.weight` in the published checkpoint."""
    return cls(in_width=2048, hidden_width=8192, out_width=4096)


class Connector(nnx.Module):
  """A two-layer MLP: float[B, T, in_width] -> float[B, T, out_width]."""

  def __init__(self, config: ConnectorConfig, *, rngs: nnx.Rngs):
    self.hidden = Linear(config.in_width, config.hidden_width, axes=("embed", "mlp"), rngs=rngs)
    self.out = Linear(config.hidden_width, config.out_width, axes=("mlp", "embed"), rngs=rngs)

  def __call__(self, hidden: jax.Array) -> jax.Array:
    return self.out(jax.nn.gelu(self.hidden(hidden), approximate=False))

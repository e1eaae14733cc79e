"""The gated MLP of the Qwen family, SwiGLU. Source: Shazeer 2020 (arXiv 2002.05202); transformers 5.23 Qwen2MLP."""

from flax import nnx
import jax

from uae_jax.layers.lora import Linear
from uae_jax.sharding import constrain


class GatedMLP(nnx.Module):
  """down(silu(gate(x)) * up(x)): float[B, ..., T, D] -> float[B, ..., T, D]."""

  def __init__(self, width: int, hidden_width: int, *, use_bias: bool, rngs: nnx.Rngs):
    self.gate = Linear(width, hidden_width, axes=("embed", "mlp"), use_bias=use_bias, rngs=rngs)
    self.up = Linear(width, hidden_width, axes=("embed", "mlp"), use_bias=use_bias, rngs=rngs)
    self.down = Linear(hidden_width, width, axes=("mlp", "embed"), use_bias=use_bias, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = jax.nn.silu(self.gate(x)) * self.up(x)
    groups = (None,) * (x.ndim - 3)
    return self.down(constrain(hidden, "batch", *groups, "act_tokens", "act_mlp"))

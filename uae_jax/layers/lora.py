"""The linear layer, and low-rank adapters for any set of linear layers.

Source: Hu et al. 2021 (arXiv 2106.09685) eq. 3; scale and initialization as in PEFT 0.17
(`init_lora_weights="gaussian"`).
"""

from collections.abc import Callable
import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers import quantized
from uae_jax.sharding import RULES, Model, gather

ADAPTER_NAMES = ("lora_a", "lora_b")
FAN_IN = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Which linear layers get an adapter, and its size.

  Attributes:
    rank: r.
    alpha: the adapter's output is scaled by alpha / r.
    targets: regular expression, searched in the layer's path (such as `layers/attention/query`); the default matches
      every linear layer.
  """

  rank: int
  alpha: float
  targets: str = ""


class Linear(nnx.Module):
  """y = x W + b + (alpha / r)(x A) B, the last term only if an adapter is attached and enabled.

  float[..., in] -> float[..., out] in the dtype of x; the adapter is applied in its own dtype (float32 in training),
  as PEFT does. Weights are all-gathered here, so a scan over stacked layers holds one gathered layer at a time.
  """

  # Set by `attach`.
  lora_a: nnx.LoRAParam
  lora_b: nnx.LoRAParam

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    axes: tuple[str | None, str | None],
    use_bias: bool = True,
    kernel_init: Callable = FAN_IN,
    rngs: nnx.Rngs,
  ):
    self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), jnp.float32), out_sharding=axes)
    if use_bias:
      self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32), out_sharding=(None,))
    self.use_bias = use_bias
    self.axes = axes
    self.lora_scale = 0.0
    self.adapters = True

  def __call__(self, x: jax.Array) -> jax.Array:
    # Flatten to two dimensions: XLA's CPU matrix product, and above all its gradient, is 20% slower with more.
    rows = x.reshape(-1, x.shape[-1])
    kernel = self.kernel.get_value()
    is_adapted = self.lora_scale and self.adapters
    if isinstance(kernel, quantized.Int8Weight):
      if kernel.has_adapter and not self.adapters:
        raise ValueError("the adapter is part of the rounded weight: it cannot be off")
      is_adapted = is_adapted and not kernel.has_adapter
      y = quantized.product(rows, kernel, self.axes)
    else:
      y = rows @ gather(jnp.asarray(kernel, x.dtype), *self.axes)
    if self.use_bias or is_adapted:
      # Summed in float32 and rounded once, as torch's addmm and PEFT do.
      total = y.astype(jnp.promote_types(y.dtype, jnp.float32))
      if self.use_bias:
        total = total + self.bias[...]
      if is_adapted:
        a = gather(self.lora_a[...], adapter_axis(self.axes[0]), "lora")
        # Makes XLA compute the gradient as [r, in]: as [in, r] its CPU matrix product is 2 to 4 times slower.
        a = jax.lax.optimization_barrier(a.T).T
        b = gather(self.lora_b[...], "lora", adapter_axis(self.axes[1]))
        total = total + self.lora_scale * ((rows.astype(a.dtype) @ a) @ b)
      y = total.astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def adapter_axis(axis: str | None) -> str:
  """The logical name of an adapter factor's long axis, given the kernel's name for that axis."""
  if axis is None or RULES[axis] is None:
    return "adapter"
  return "adapter_tensor" if RULES[axis] == "tensor" else axis


def attach(model: nnx.Module, lora: LoRA, *, rngs: nnx.Rngs) -> None:
  """Adds adapters in place, stacked for stacked layers; B = 0, so the outputs do not change.

  A is normal with standard deviation 1/r (not variance 1/r), as in PEFT's "gaussian" initialization.

  Raises:
    ValueError: `lora.targets` matches no linear layer, or a matched layer already has an adapter.
  """
  found = False
  for path, module in nnx.iter_modules(model):
    name = "/".join(str(part) for part in path)
    if not isinstance(module, Linear) or not re.search(lora.targets, name):
      continue
    if module.lora_scale:
      raise ValueError(f"{name} already has an adapter")
    found = True
    *stacked, in_features, out_features = module.kernel.shape
    leading = ("layers",) * len(stacked)
    a = jax.random.normal(rngs.params(), (*stacked, in_features, lora.rank)) / lora.rank
    module.lora_a = nnx.LoRAParam(a, out_sharding=(*leading, adapter_axis(module.axes[0]), "lora"))
    module.lora_b = nnx.LoRAParam(
      jnp.zeros((*stacked, lora.rank, out_features)), out_sharding=(*leading, "lora", adapter_axis(module.axes[1]))
    )
    module.lora_scale = lora.alpha / lora.rank
  if not found:
    raise ValueError(f"LoRA targets {lora.targets!r} match no linear layer")


def adapters_off(model: Model) -> Model:
  """The reference policy: a new module that shares the weights, with every adapter off; `model` is unchanged."""
  model = nnx.merge(*nnx.split(model))
  for _, module in nnx.iter_modules(model):
    if isinstance(module, Linear):
      module.adapters = False
  return model


def is_adapter(path: str) -> bool:
  """Whether a parameter path ends in an adapter leaf."""
  return path.rsplit("/", 1)[-1] in ADAPTER_NAMES


def merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """W + (alpha / r) A B of one layer or of stacked layers, in the dtype of the adapter."""
  delta = scale * jnp.einsum("...ir,...ro->...io", a, b)
  return kernel.astype(delta.dtype) + delta


def merge_adapters(params: dict, scale: float) -> dict:
  """Merges adapters into their kernels, W + (alpha / r) A B; the result has no adapter leaves.

  Args:
    params: nested dict; adapted layers hold `kernel`, `lora_a` and `lora_b`.
    scale: alpha / r.
  """
  if "lora_a" in params:
    merged = {name: leaf for name, leaf in params.items() if name not in ADAPTER_NAMES}
    kernel = merged_kernel(params["kernel"], params["lora_a"], params["lora_b"], scale)
    merged["kernel"] = kernel.astype(params["kernel"].dtype)
    return merged
  return {name: merge_adapters(leaf, scale) if isinstance(leaf, dict) else leaf for name, leaf in params.items()}

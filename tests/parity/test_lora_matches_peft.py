"""Fresh adapters have the distribution of PEFT's "gaussian" initialization."""

from flax import nnx
import pytest
import torch

from uae_jax.layers import lora
from uae_jax.layers.lora import Linear, LoRA


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_initial_scale_is_that_of_peft(rank):
  peft = pytest.importorskip("peft")

  class Net(nnx.Module):
    def __init__(self):
      self.layer = Linear(4096, 8, axes=(None, None), rngs=nnx.Rngs(0))

  with nnx.use_eager_sharding(False):
    ours = Net()
    lora.attach(ours, LoRA(rank, 2.0 * rank), rngs=nnx.Rngs(1))
  torch.manual_seed(0)
  settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights="gaussian")
  theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4096, 8)), settings).base_model.model[0]
  a, b = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
  # At least 16384 normal numbers: the standard deviation is known to 0.6 %.
  assert float(ours.layer.lora_a[...].std()) == pytest.approx(float(a.std()), rel=0.03)
  assert not ours.layer.lora_b[...].any() and not b.any()
  assert ours.layer.lora_scale == theirs.scaling["default"]

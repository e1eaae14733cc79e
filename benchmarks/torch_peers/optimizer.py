"""AdamW with gradient clipping over the trainable parameters."""

import torch


class Optimizer:
  """AdamW with the settings of `uae_jax.training.optimizer.OptimizerOptions`."""

  def __init__(self, model: torch.nn.Module, learning_rate: float = 1e-4):
    self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    self._optimizer = torch.optim.AdamW(self._parameters, learning_rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)

  def step(self) -> float:
    """Applies and clears the gradients; returns their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return float(norm)

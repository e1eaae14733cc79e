"""Low-rank adapters in plain PyTorch, for machines without PEFT: the part of its interface that the peers use."""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import re

from safetensors.torch import load_file
import torch
from torch import nn

PREFIX = "base_model.model."


class Adapted(nn.Module):
  """A frozen linear layer or patch convolution W plus scale B A, with A and B in float32, as PEFT computes it."""

  def __init__(self, base: nn.Module, rank: int, scale: float):
    super().__init__()
    self.base, self.scale, self.is_on, self.is_merged = base, scale, True, False
    options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
    if isinstance(base, nn.Conv2d):
      self.lora_A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, **options)
      self.lora_B = nn.Conv2d(rank, base.out_channels, 1, **options)
    else:
      self.lora_A = nn.Linear(base.in_features, rank, **options)
      self.lora_B = nn.Linear(rank, base.out_features, **options)
    nn.init.zeros_(self.lora_B.weight)

  def forward(self, x):
    y = self.base(x)
    if self.is_merged or not self.is_on:
      return y
    return (y + self.scale * self.lora_B(self.lora_A(x.float()))).to(y.dtype)

  @torch.no_grad()
  def add(self, factor: float) -> None:
    """Adds factor * scale B A to the weight."""
    product = self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)
    weight = self.base.weight
    weight += (factor * self.scale * product).reshape(weight.shape).to(weight.dtype)


class Policy(nn.Module):
  """A model with adapters on the layers whose names match fully; "all-linear" is every linear layer.

  The layers are replaced in place, as PEFT does.
  """

  def __init__(self, model: nn.Module, rank: int, alpha: float, targets: str | list[str]):
    super().__init__()
    self.model = model
    for name in [name for name, layer in model.named_modules() if is_target(name, layer, targets)]:
      parent, _, last = name.rpartition(".")
      layer = model.get_submodule(name)
      setattr(model.get_submodule(parent), last, Adapted(layer, rank, alpha / rank))

  @classmethod
  def from_pretrained(cls, model: nn.Module, folder: Path) -> "Policy":
    """Reads an adapter folder of PEFT.

    Raises:
      ValueError: the file has other tensors than the model has adapters.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    policy = cls(model, settings["r"], settings["lora_alpha"], settings["target_modules"])
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = {f"{PREFIX}{name}.lora_{x}.weight" for name, _ in policy.adapters() for x in "AB"}
    if wanted != set(tensors):
      raise ValueError(f"{folder}: adapters differ: {sorted(wanted ^ set(tensors))[:3]}")
    with torch.no_grad():
      for name, adapter in policy.adapters():
        for x in "AB":
          getattr(adapter, f"lora_{x}").weight.copy_(tensors[f"{PREFIX}{name}.lora_{x}.weight"])
    return policy

  def adapters(self) -> Iterator[tuple[str, Adapted]]:
    return ((name, layer) for name, layer in self.model.named_modules() if isinstance(layer, Adapted))

  def forward(self, *arguments, **options):
    return self.model(*arguments, **options)

  def merge_adapter(self) -> None:
    self._set_merged(True)

  def unmerge_adapter(self) -> None:
    self._set_merged(False)

  def _set_merged(self, is_merged: bool) -> None:
    for _, adapter in self.adapters():
      if adapter.is_merged != is_merged:
        adapter.add(1.0 if is_merged else -1.0)
        adapter.is_merged = is_merged

  @contextlib.contextmanager
  def disable_adapter(self):
    layers = [layer for _, layer in self.adapters()]
    for layer in layers:
      layer.is_on = False
    try:
      yield
    finally:
      for layer in layers:
        layer.is_on = True


def is_target(name: str, layer: nn.Module, targets: str | list[str]) -> bool:
  """PEFT's rule: a list names ends of paths, a text is a regular expression of whole paths."""
  if not isinstance(layer, nn.Linear | nn.Conv2d):
    return False
  if targets == "all-linear":
    return isinstance(layer, nn.Linear)
  if isinstance(targets, str):
    return re.fullmatch(targets, name) is not None
  return any(name == target or name.endswith(f".{target}") for target in targets)

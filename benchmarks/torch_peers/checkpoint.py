"""Saves and restores all parameters with `torch.save`."""

import os
from pathlib import Path
import tempfile

import torch

from benchmarks.timing import Case
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  def tensors():
    models = (nets.captioner_policy, nets.connector, nets.decoder_policy, nets.vae, nets.clip, nets.dinov2)
    found = {f"{i}.{name}": value for i, model in enumerate(models) for name, value in model.state_dict().items()}
    # Tied tensors are stored once.
    return found, sum(value.nbytes for value in {value.data_ptr(): value for value in found.values()}.values()) / 1e6

  def path(name):
    return Path(tempfile.gettempdir()) / f"benchmarks_checkpoint_{name}.pt"

  def save():
    values, megabytes = tensors()

    def run():
      torch.save(values, path("save"))
      # Syncs to disk, because Orbax also returns only when the file is complete on disk.
      with open(path("save"), "rb") as file:
        os.fsync(file.fileno())

    return Case(run=run, unit="MB", amount=megabytes)

  def restore():
    values, megabytes = tensors()
    torch.save(values, path("restore"))
    return Case(run=lambda: torch.load(path("restore"), map_location=nets.device), unit="MB", amount=megabytes)

  return {"save all parameters": save, "restore all parameters": restore}

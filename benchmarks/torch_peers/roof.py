"""Rates that the hardware reaches with PyTorch in a plain matrix product and in plain memory reads."""

import torch

from benchmarks.sizes import ROOF_ROWS, roof_widths
from benchmarks.timing import Case
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  side, wide = roof_widths(nets.size)

  def product(rows, side):
    a, b = (torch.ones(n, side, dtype=nets.dtype, device=nets.device) for n in (rows, side))

    @torch.no_grad()
    def run():
      a @ b
      nets.wait()

    return Case(
      run=run,
      unit="products",
      amount=1,
      flops=2.0 * rows * side**2,
      bytes=float(side**2 * a.element_size()),
    )

  return {"matrix product": lambda: product(side, side), "matrix reading": lambda: product(ROOF_ROWS, wide)}

"""Rates that the hardware reaches with PyTorch: a plain matrix product, plain reads and copies of memory, attention."""

import numpy as np
import torch

from benchmarks.sizes import ROOF_ROWS, roof_attention, roof_widths
from benchmarks.timing import Case
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  side, wide = roof_widths(nets.size)

  def random(*shape):
    noise = np.resize(np.random.default_rng(0).standard_normal(2**20 + 7, np.float32), shape)
    return nets.tensor(noise).to(nets.dtype)

  def case(function, arguments, flops, byte_count):
    @torch.no_grad()
    def run():
      function(*arguments)
      nets.wait()

    return Case(run=run, unit="runs", amount=1, flops=flops, bytes=byte_count)

  def product(rows, side):
    a, b = random(rows, side), random(side, side)
    return case(torch.matmul, (a, b), 2.0 * rows * side**2, float(side**2 * a.element_size()))

  def copy():
    a = random(wide, wide)
    return case(lambda a: a + 1, (a,), None, 2.0 * wide**2 * a.element_size())

  def attend():
    shape = batch, tokens, heads, width = roof_attention(nets.size)
    arrays = tuple(random(*shape).transpose(1, 2) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    return case(attention, arrays, 4.0 * batch * heads * tokens**2 * width, None)

  return {
    "matrix product": lambda: product(side, side),
    "matrix reading": lambda: product(ROOF_ROWS, wide),
    "memory copy": copy,
    "attention": attend,
  }

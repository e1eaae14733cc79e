"""TPU slices: generations, topologies, hosts, their names in Google Cloud, and list prices.

The peaks and the memory of a chip are in `uae_jax.planning.chips`. Names, machine types and topologies: Google's pages
"TPU configurations" and "Plan TPUs in GKE"; XPK 1.16 and SkyPilot 0.14 use the same.
"""

import dataclasses
import difflib
import math
import re

from uae_jax.planning.chips import CHIPS
from uae_jax.planning.prices import PRICES, Price

PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclasses.dataclass(frozen=True)
class Generation:
  """One generation of TPU.

  Attributes:
    name: as in topology names, such as "v5e"; also the key of its chip in CHIPS.
    type_prefix: of accelerator types, such as "v5litepod".
    units_per_chip: what the number of an accelerator type counts per chip: 2 if cores, 1 if chips.
    runtime: default image of a TPU VM; None if `gcloud compute tpus` does not offer this generation.
    gke_accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
    machine: machine type in GKE, less the number of chips.
    max_chips: of a slice.
  """

  name: str
  type_prefix: str
  units_per_chip: int
  runtime: str | None
  gke_accelerator: str
  machine: str
  max_chips: int

  @property
  def price(self) -> Price:
    """List price on demand."""
    return PRICES[self.name]

  @property
  def is_flat(self) -> bool:
    """Whether the chips form a plane (v5e, v6e) and not a torus with three axes."""
    return self.name in ("v5e", "v6e")

  def shapes(self, num_chips: int) -> list[tuple[int, ...]]:
    """All shapes of this many chips, the most cubic one first."""
    if self.is_flat:
      return [shape for shape in PLANES if math.prod(shape) == num_chips]
    small = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    if num_chips < 64:
      return [s for s in small if math.prod(s) == num_chips and (num_chips > 1 or self.name == "tpu7x")]
    if num_chips > self.max_chips or num_chips % 64:
      return []
    cubes = num_chips // 64
    found = [
      (4 * a, 4 * b, 4 * (cubes // a // b))
      for a in range(1, round(cubes ** (1 / 3)) + 2)
      for b in range(a, math.isqrt(cubes // a) + 1)
      if cubes % (a * b) == 0 and cubes // a // b >= b
    ]
    return sorted(found, key=lambda shape: shape[2])


GENERATIONS = {
  generation.name: generation
  for generation in (
    Generation("v4", "v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu", 2048),
    Generation("v5e", "v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu", 256),
    Generation("v5p", "v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu", 6144),
    Generation("v6e", "v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard", 256),
    Generation("tpu7x", "tpu7x", 2, None, "tpu7x", "tpu7x-standard", 9216),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice: chips of one generation in one shape."""

  generation: Generation
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.generation.name}:{self.topology}"

  @property
  def topology(self) -> str:
    """The shape as in Google Cloud, such as "4x4"."""
    return "x".join(map(str, self.shape))

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape)

  @property
  def chips_per_host(self) -> int:
    return 8 if self.shape == (2, 4) else min(self.num_chips, 4)

  @property
  def num_hosts(self) -> int:
    return self.num_chips // self.chips_per_host

  @property
  def accelerator_type(self) -> str:
    """Google's name of the slice, such as "v5litepod-16"; ambiguous unless `is_default_shape`."""
    return f"{self.generation.type_prefix}-{self.num_chips * self.generation.units_per_chip}"

  @property
  def is_default_shape(self) -> bool:
    return self.shape == self.generation.shapes(self.num_chips)[0]

  @property
  def machine_type(self) -> str:
    return f"{self.generation.machine}-{self.chips_per_host}t"

  def cost(self, num_slices: int) -> str:
    """One line: chips, hosts, memory and price."""
    price, chips = self.generation.price, num_slices * self.num_chips
    hbm = CHIPS[self.generation.name].hbm_bytes / 2**30
    return (
      f"{num_slices} x {self}: {chips} chips of {hbm:.4g} GiB on {num_slices * self.num_hosts} hosts; list price on "
      f"demand about {chips * price.usd:.2f} USD per hour ({price.usd:.2f} per chip in {price.region}; {price.source})"
    )


def parse(text: str) -> Slice:
  """Parses a topology such as `v5e:4x4`, or Google's name for it, `v5litepod-16`, or `v5e-16`.

  Raises:
    ValueError: there is no such slice; names what there is.
  """
  if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text):
    generation = GENERATIONS.get(match[1])
    shape = tuple(int(size) for size in match[2].split("x"))
    if generation and shape in generation.shapes(math.prod(shape)):
      return Slice(generation, shape)
  else:
    prefix, _, size = text.rpartition("-")
    generation = next((g for g in GENERATIONS.values() if prefix in (g.type_prefix, g.name)), None)
    if generation and size.isdecimal() and int(size) % generation.units_per_chip == 0:
      if shapes := generation.shapes(int(size) // generation.units_per_chip):
        return Slice(generation, shapes[0])
  if generation:
    sizes = [chips for chips in range(1, 513) if generation.shapes(chips)]
    known = ", ".join(str(Slice(generation, generation.shapes(chips)[0])) for chips in sizes[:6])
    raise ValueError(f"{text}: {generation.name} does not come in this size, but in {known}, ...")
  names = [*GENERATIONS, *(g.type_prefix for g in GENERATIONS.values())]
  near = difflib.get_close_matches(re.split("[:-]", text)[0], names, n=1)
  hint = f", did you mean {near[0]}?" if near else ""
  raise ValueError(
    f"unknown slice {text!r}{hint}: expected GENERATION:SHAPE such as v5e:4x4 with a generation of "
    f"{', '.join(GENERATIONS)}, or Google's name of a slice such as v5litepod-16"
  )

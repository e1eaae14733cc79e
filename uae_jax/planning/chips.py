"""Published specifications of TPU chips.

Source: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x (peak compute, HBM bandwidth, bidirectional
inter-chip bandwidth per chip). The int8 peak of v4 is that of bfloat16; none is published for tpu7x. The HBM limit is
the capacity that libtpu 0.0.42 compiles for, slightly less than the published 16, 95, 32 and 192 GB; that of v4 is the
published one.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates and memory of one chip.

  Attributes:
    name: generation as in topology names, such as "v5e".
    hbm_bytes: memory that a program may use, in bytes.
    flops: peak bfloat16 FLOP/s.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s into the chip over all its links, half the published bidirectional figure.
    num_devices: number of devices as which JAX shows one chip.
    int8_flops: peak of products of int8 with int8, in operations/s; None where it is that of bfloat16.
  """

  name: str
  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  num_devices: int = 1
  int8_flops: float | None = None

  @property
  def device(self) -> "Chip":
    """One of the chip's devices, with its share of everything."""
    rates = ("hbm_bytes", "flops", "hbm_bandwidth", "link_bandwidth", "int8_flops")
    share = {field: rate / self.num_devices for field in rates if (rate := getattr(self, field)) is not None}
    return dataclasses.replace(self, **share, num_devices=1)


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9),
    Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9, int8_flops=393e12),
    Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9, int8_flops=918e12),
    Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 400e9, int8_flops=1836e12),
    # Ironwood. Each of its two devices has a memory of its own, 94.75 GiB.
    Chip("tpu7x", 2 * 94.75 * GIB, 2307e12, 7380e9, 600e9, num_devices=2),
  )
}

"""Published specifications of TPU chips.

Source: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x (peak compute, HBM bandwidth, bidirectional
inter-chip bandwidth per chip). The HBM limit of v5e, v5p and v6e is the capacity that libtpu 0.0.42 compiles for,
slightly less than the published 16, 95 and 32 GB; that of v4 and tpu7x is the published one.
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
  """

  name: str
  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9),
    Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
    Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
    Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 400e9),
    Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9),
  )
}

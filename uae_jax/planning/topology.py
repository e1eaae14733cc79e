"""TPU slices by name, as devices for which programs can be compiled without a TPU."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from uae_jax.planning.chips import CHIPS, Chip

# libtpu queries its host for a TPU, and there is none. Variables that are already set take precedence.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Cloud's name of a slice -> topology. Names of v5p and tpu7x count cores, two per chip; the others count chips.
CLOUD_NAMES = {
  **{
    f"{prefix}-{chips}": f"{generation}:{shape}"
    for generation, prefix in (("v5e", "v5e"), ("v5e", "v5litepod"), ("v6e", "v6e"))
    for chips, shape in ((4, "2x2"), (8, "2x4"), (16, "4x4"), (32, "4x8"), (64, "8x8"), (128, "8x16"), (256, "16x16"))
  },
  **{
    f"{generation}-{2 * chips}": f"{generation}:{shape}"
    for generation in ("v5p", "tpu7x")
    for chips, shape in ((4, "2x2x1"), (8, "2x2x2"), (16, "2x2x4"), (32, "2x4x4"), (64, "4x4x4"))
  },
}
GRAMMAR = re.compile(r"(v5e|v5p|v6e|tpu7x):(\d+x\d+(?:x\d+)?)")


def parse(name: str) -> tuple[Chip, str]:
  """Parses `v5e:4x4`, or Cloud's name for it, `v5e-16`, into (chip, topology).

  Raises:
    ValueError: there is no slice of this name.
  """
  name = CLOUD_NAMES.get(name, name)
  match = GRAMMAR.fullmatch(name)
  if match is None:
    raise ValueError(
      f"--topology={name}: expected GENERATION:SHAPE with a generation of v5e, v5p, v6e or tpu7x, such as "
      "v5e:4x4 or tpu7x:2x2x1, or Cloud's name of a slice, such as v5p-16"
    )
  return CHIPS[match[1]], name


def slice_devices(name: str, num_slices: int = 1) -> tuple[Chip, list[jax.Device]]:
  """The chip type and the devices of a slice, or of several equal slices; tpu7x has two devices per chip.

  Raises:
    ValueError: libtpu is not installed, or there is no slice of this name.
  """
  chip, topology = parse(name)
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("libtpu, the compiler for TPUs, is not installed: pip install 'uae_jax[aot]'")
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options: dict[str, Any] = {}
  if set(topology.split(":")[1].split("x")) == {"1"}:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if num_slices > 1:
    options["num_slices"] = num_slices
  try:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"--topology={name}: libtpu knows no such slice ({reason})") from error
  return chip, list(description.devices)

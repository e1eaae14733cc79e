"""`uae-jax plan`: whether a config fits a TPU slice, and what a step of it costs, without a TPU."""

import json
import os
from pathlib import Path
import sys
import tempfile

from uae_jax.commands.command_line import parse_config_flags

USAGE = """usage: uae-jax plan --config=FILE[:VARIANT] --topology=SLICE [--slices=N] [--stages=NAME,...]
                    [--effort=low|default] [--json=FILE] [--config.FIELD=VALUE ...]

Compiles every program of every stage for SLICE (v5e:4x4, v5p:2x2x2, v6e:4x4, or Cloud's names such as v5e-16) and tells
HBM a chip, FLOPs and bytes a step, collectives, and the least time of a step at the chip's published peaks. No weights
and no TPU are needed, only libtpu: pip install 'uae_jax[aot]'. Exit code 0 if everything fits, 1 if not.

--slices    that many equal slices, joined by the network; config.mesh.data spans them
--stages    only these
--effort    of the compiler; low, the default, is several times faster and changes memory by a few percent
--json      writes the plan there as well
"""


def main(argv: list[str]) -> int:
  """Parses absl and ml_collections flags and plans."""
  if not argv or "--help" in argv or "-h" in argv:
    print(USAGE, end="")
    return 0
  values = parse_config_flags("plan", argv, define_flags, needed=("config", "topology"))
  result, text = plan(values.config, values.topology, values.slices, values.stages, values.effort)
  print(text)
  if values.json:
    Path(values.json).write_text(json.dumps({"command": ["uae-jax", "plan", *argv]} | result, indent=1) + "\n")
  return 0 if result["fits"] else 1


def define_flags(flags, values) -> None:
  flags.DEFINE_string("topology", None, "slice", flag_values=values)
  flags.DEFINE_integer("slices", 1, "how many", lower_bound=1, flag_values=values)
  flags.DEFINE_list("stages", None, "some of the config's", flag_values=values)
  flags.DEFINE_enum("effort", "low", ["low", "default"], "of the compiler", flag_values=values)
  flags.DEFINE_string("json", None, "file", flag_values=values)


def plan(config, topology: str, num_slices: int, stages: list[str] | None, effort: str) -> tuple[dict, str]:
  """(plain dict, text) of a plan.

  Raises:
    ValueError: no libtpu, an unknown slice or stage, a mesh that does not fit it, or an impossible config.
  """
  # JAX reads it when it is imported; a slice is compiled for from the CPU wherever this runs.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from uae_jax import sharding
  from uae_jax.planning import tables
  from uae_jax.planning import topology as slices
  from uae_jax.planning.plan import plan_stage
  from uae_jax.planning.stage_programs import build_abstract, cuts, images_and_captions
  from uae_jax.training.stage import validate

  stages = stages or list(config.stages)
  for name in stages:
    if name not in config.stages:
      raise ValueError(f"--stages names {name!r}, config.stages are {', '.join(config.stages)}")
  config.stages = tuple(stages)
  validate(config)
  # Programs for a TPU cannot be read back from the cache without one.
  jax.config.update("jax_enable_compilation_cache", False)
  chip, devices = slices.slice_devices(topology, num_slices)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  with tempfile.TemporaryDirectory() as folder:
    built = build_abstract(config, mesh, Path(folder) / "processor")
    plans = []
    for name in stages:
      plans += plan_stage(
        config, name, built, mesh, chip, effort, lambda text: print(text, file=sys.stderr, flush=True)
      )
  about = {"topology": topology, "num_slices": num_slices, "num_chips": len(devices), "effort": effort}
  about |= {"model": config.model, "image_px": config.data.image_px, "mesh": config.mesh.to_dict()}
  about["stages"] = {name: images_and_captions(config, name) | {"cuts": cuts(config, name)} for name in stages}
  return tables.to_json(plans, chip=chip.name, **about), tables.to_text(plans, chip, len(devices))

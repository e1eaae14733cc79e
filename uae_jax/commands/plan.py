"""`uae-jax plan`: checks without a TPU whether a config fits a TPU slice, and what a step costs."""

import dataclasses
import json
import os
from pathlib import Path
import sys
import tempfile

from uae_jax.commands import config_file
from uae_jax.commands.command_line import Parser, number, path
from uae_jax.files import write_whole
from uae_jax.options import Experiment

EPILOG = (
  "Needs libtpu (pip install 'uae_jax[aot]'), but no weights and no TPU. Every field of the config is a flag, for "
  "example --config.mesh.fsdp=32. The exit code is 0 if everything fits, else 1."
)


def parser() -> Parser:
  parser = Parser(
    "plan",
    "Compiles every program of every stage for a TPU slice and reports HBM per chip, FLOPs and bytes per step, "
    "collectives, and a lower bound of the step time at the chip's published peaks.",
    EPILOG,
  )
  parser.add_argument(
    "--topology", required=True, metavar="SLICE", help="such as v5e:4x4 or v5p:2x2x2, or Cloud's name v5e-16"
  )
  parser.add_argument(
    "--slices",
    type=number(int, at_least=1),
    default=1,
    help="equal slices, connected by the data-center network; default 1",
  )
  parser.add_argument("--stages", metavar="NAME,...", help="plan only these stages")
  parser.add_argument(
    "--effort",
    choices=("low", "default"),
    default="low",
    help="compiler effort; low compiles several times faster and changes memory by a few percent; default %(default)s",
  )
  parser.add_argument("--json", type=path, metavar="FILE", help="also write the plan to this file")
  return parser


def main(argv: list[str]) -> int:
  """Parses the arguments and plans."""
  arguments, config = config_file.parse(parser(), argv)
  stages = arguments.stages.split(",") if arguments.stages else None
  result, text = plan(config, arguments.topology, arguments.slices, stages, arguments.effort)
  print(text)
  if arguments.json:
    write_whole(arguments.json, json.dumps({"command": ["uae-jax", "plan", *argv]} | result, indent=1) + "\n")
  return 0 if result["fits"] else 1


def plan(config: Experiment, topology: str, num_slices: int, stages: list[str] | None, effort: str) -> tuple[dict, str]:
  """Plans the stages; returns (JSON-serializable dict, text).

  Raises:
    ValueError: libtpu is missing, a slice or stage is unknown, the mesh does not match the slice, or the config is
      invalid.
  """
  # JAX reads this on import; compiling for a slice runs on the CPU backend on every machine.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from uae_jax import sharding
  from uae_jax.planning import tables
  from uae_jax.planning import topology as slices
  from uae_jax.planning.plan import plan_stage
  from uae_jax.planning.stage_programs import build_abstract, cuts, images_and_captions
  from uae_jax.training.validate import validate

  stages = stages or list(config.stages)
  for name in stages:
    if name not in config.stages:
      raise ValueError(f"--stages names {name!r}, config.stages are {', '.join(config.stages)}")
  config = dataclasses.replace(config, stages=tuple(stages))
  validate(config)
  # Without a TPU, programs for one cannot be read back from the compilation cache.
  jax.config.update("jax_enable_compilation_cache", False)
  chip, devices = slices.slice_devices(topology, num_slices)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  with tempfile.TemporaryDirectory() as folder:
    built = build_abstract(config, mesh, Path(folder) / "processor")
    plans = []
    for name in stages:
      plans += plan_stage(
        config, name, built, mesh, chip, effort, lambda text: print(text, file=sys.stderr, flush=True)
      )
  about = {"topology": topology, "num_slices": num_slices, "num_chips": len(devices), "effort": effort}
  about |= {"model": config.model, "image_px": config.data.image_px, "mesh": dataclasses.asdict(config.mesh)}
  about["stages"] = {name: images_and_captions(config, name) | {"cuts": cuts(config, name)} for name in stages}
  return tables.to_json(plans, chip=chip.name, **about), tables.to_text(plans, chip, len(devices))

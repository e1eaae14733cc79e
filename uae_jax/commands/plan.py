"""`uae-jax plan`: checks without a TPU whether a config fits a TPU slice, and what a step costs."""

import dataclasses
import json
import math
import os
from pathlib import Path
import sys
import tempfile

from uae_jax import outputs
from uae_jax.commands import compiler_flags, config_file
from uae_jax.commands.command_line import Parser, number, output_path
from uae_jax.files import write_whole
from uae_jax.options import Experiment

EPILOG = (
  "Needs libtpu (pip install 'uae_jax[aot]'), but no weights and no TPU. Every field of the config is a flag, for "
  "example --config.mesh.fsdp=32. The exit code is 0 if everything fits, else 1. With several slices, the mesh of each "
  "is config.mesh with fsdp, and data where fsdp has no more room, adapted to its size; they are ranked by cost, and "
  "the exit code is 0 if one of them fits."
)


def parser() -> Parser:
  parser = Parser(
    "plan",
    "Compiles every program of every stage for a TPU slice and reports HBM per chip, FLOPs and bytes per step, "
    "collectives, and a lower bound of the step time at the chip's published peaks.",
    EPILOG,
  )
  parser.add_argument(
    "--topology",
    required=True,
    metavar="SLICE[,SLICE...]",
    help="such as v5e:4x4, v5p:2x2x2 or tpu7x:2x2x1, or Cloud's name v5e-16; several are ranked by cost",
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
  parser.add_argument(
    "--price",
    type=number(float, at_least=0),
    metavar="USD",
    help="price of a chip-hour; default: the list price on demand, if uae_jax/planning/prices.py has one",
  )
  parser.add_argument("--json", type=output_path, metavar="FILE", help="also write the plan to this file")
  return parser


def main(argv: list[str]) -> int:
  """Parses the arguments and plans."""
  arguments, config = config_file.parse(parser(), argv)
  if arguments.json:
    outputs.require_file(arguments.json, "--json", outputs.JSON)
  stages = arguments.stages.split(",") if arguments.stages else None
  compiler_flags.add(dataclasses.replace(config, xla_flags=""))  # those may be for the host that trains
  topologies = arguments.topology.split(",")
  results = []
  for topology in topologies:
    try:
      result, text = plan(
        config if len(topologies) == 1 else adapted(config, topology, arguments.slices),
        topology,
        arguments.slices,
        stages,
        arguments.effort,
        arguments.price,
      )
    except ValueError as error:
      if len(topologies) == 1:
        raise
      result, text = {"topology": topology, "fits": False, "error": str(error)}, f"{topology}: {error}"
    results.append(result)
    print(text, end="\n" if len(topologies) == 1 else "\n\n")
  if len(topologies) > 1:
    from uae_jax.planning.tables import ranking

    print(ranking(results))
  if arguments.json:
    content = results[0] if len(topologies) == 1 else {"slices": results}
    write_whole(arguments.json, json.dumps({"command": ["uae-jax", "plan", *argv]} | content, indent=1) + "\n")
  return 0 if any(result["fits"] for result in results) else 1


def adapted(config: Experiment, topology: str, num_slices: int) -> Experiment:
  """The config with a mesh for all devices of a slice, or of several: `fsdp` up to its limit, the rest on `data`.

  Raises:
    ValueError: there is no slice of this name, or `tensor` does not divide it; the message names the field.
  """
  from uae_jax.planning import topology as slices
  from uae_jax.sharding import MAX_FSDP

  chip, name = slices.parse(topology)
  count = math.prod(int(size) for size in name.split(":")[1].split("x")) * chip.num_devices
  if count % config.mesh.tensor:
    raise ValueError(f"{count} devices do not divide by config.mesh.tensor = {config.mesh.tensor}")
  rows = count // config.mesh.tensor
  fsdp = next(size for size in range(min(rows, MAX_FSDP), 0, -1) if rows % size == 0)
  mesh = dataclasses.replace(config.mesh, data=num_slices * rows // fsdp, fsdp=fsdp)
  return dataclasses.replace(config, mesh=mesh)


def plan(
  config: Experiment,
  topology: str,
  num_slices: int,
  stages: list[str] | None,
  effort: str,
  usd_per_chip_hour: float | None = None,
) -> tuple[dict, str]:
  """Plans the stages; returns (JSON-serializable dict, text).

  Raises:
    ValueError: libtpu is missing, a slice or stage is unknown, the mesh does not match the slice, or the config is
      invalid.
  """
  # JAX reads this on import; compiling for a slice runs on the CPU backend on every machine.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from uae_jax import sharding
  from uae_jax.evaluation import stage_suites
  from uae_jax.planning import tables
  from uae_jax.planning import topology as slices
  from uae_jax.planning.plan import plan_stage
  from uae_jax.planning.prices import PRICES, Price, usd_per_1000_steps
  from uae_jax.planning.stage_programs import bucket_tokens, build_abstract, settings_of
  from uae_jax.training.validate import validate

  stages = stages or list(config.stages)
  for name in stages:
    if name not in config.stages:
      raise ValueError(f"--stages names {name!r}, config.stages are {', '.join(config.stages)}")
  config = dataclasses.replace(config, stages=tuple(stages))
  validate(config)
  stage_suites.check(config)
  # Without a TPU, programs for one cannot be read back from the compilation cache.
  jax.config.update("jax_enable_compilation_cache", False)
  chip, devices = slices.slice_devices(topology, num_slices)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  with tempfile.TemporaryDirectory() as folder:
    built = build_abstract(config, mesh, Path(folder) / "processor")
    plans = []
    for name in stages:
      plans += plan_stage(
        config, name, built, mesh, chip.device, effort, lambda text: print(text, file=sys.stderr, flush=True)
      )
  num_chips = len(devices) // chip.num_devices
  price = PRICES.get(chip.name) if usd_per_chip_hour is None else Price(usd_per_chip_hour, "", "--price")
  seconds = tables.step_seconds(plans)
  cost = {name: usd_per_1000_steps(seconds[name], num_chips, price) for name in stages} if price else None
  about = {"topology": topology, "num_slices": num_slices, "num_chips": num_chips, "effort": effort}
  about |= {"model": config.model, "image_px": config.data.image_px, "mesh": dataclasses.asdict(config.mesh)}
  about["stages"] = {name: settings_of(config, name) for name in stages}
  about |= {"step_seconds": seconds, "usd_per_1000_steps": cost}
  text = tables.to_text(plans, chip, len(devices), price)
  if buckets := bucket_tokens(config, built):
    about["buckets"] = buckets
    text = "\n".join([*tables.bucket_table(buckets), text])
  return tables.to_json(plans, chip=chip.name, **about), text

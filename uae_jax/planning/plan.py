"""A plan: compiles every program of the chosen stages for a slice and checks whether it fits."""

from collections.abc import Callable, Sequence
import dataclasses
import re
import time

import jax
from jax.sharding import Mesh

from uae_jax.planning import collectives, cost
from uae_jax.planning.chips import GIB, Chip
from uae_jax.planning.stage_programs import LEVERS, Program, bytes_per_device, stage_programs
from uae_jax.sharding import batch_sharding, replicated
from uae_jax.training.build import Built

# XLA compiler options. In a measurement, "low" compiled a full-size training step four times faster.
EFFORTS = {"default": {}, "low": {"exec_time_optimization_effort": -1.0}}
EXCEEDED = re.compile(r"\(?([\d.]+)([KMGT])\)? (?:exceeds available|of [\d.]+[KMGT] hbm)", re.IGNORECASE)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """HBM of one chip, in bytes.

  Attributes:
    arguments: arguments of the program.
    outputs: outputs that do not reuse the buffer of a donated argument.
    temporaries: buffers that exist while the program runs, and its code.
    held: arrays that stay in memory but are not arguments: parameters and optimizer state that the program does not
      use, and parameters saved from before the stage.
    limit: capacity of the chip.
    peak: the compiler's estimate of the maximum in use at once, including arguments and `held`. It is below the total;
      `fits` tests the total.
  """

  arguments: float
  outputs: float
  temporaries: float
  held: float
  limit: float
  peak: float

  @property
  def total(self) -> float:
    return self.arguments + self.outputs + self.temporaries + self.held

  @property
  def fits(self) -> bool:
    return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """Memory and cost of one program.

  Attributes:
    stage: name of the stage.
    phase: "step", "rollout", "reward" or "update".
    memory: HBM of one chip.
    is_compiled: False if XLA ran out of memory: then only the arguments and the bytes that XLA requested are known.
    work: work of one chip.
    collectives: see `collectives.summary`.
    link_seconds: seconds to transfer the bytes of the collectives at the peak of a chip's links.
    lever: settings to change if the program does not fit.
    compile_seconds: wall time of tracing and compiling.
  """

  stage: str
  phase: str
  memory: Memory
  is_compiled: bool
  work: cost.Work
  collectives: dict[str, dict]
  link_seconds: float
  lever: str
  compile_seconds: float

  @property
  def seconds(self) -> float:
    """Lower bound of a call: products and links at their peaks, fully overlapped."""
    return max(self.work.seconds, self.link_seconds)

  @property
  def fits(self) -> bool:
    return self.is_compiled and self.memory.fits


def plan_stage(
  config, name: str, built: Built, mesh: Mesh, chip: Chip, effort: str, log: Callable[[str], None]
) -> list[ProgramPlan]:
  """Compiles the programs of a stage in order; the outputs of each become arguments of the next."""
  plans: list[ProgramPlan] = []
  outputs = None
  generator = stage_programs(config, name, built, mesh)
  while True:
    try:
      program = generator.send(outputs)
    except StopIteration:
      return plans
    log(f"{program.stage} {program.phase}: compiling")
    plan, outputs = plan_program(program, mesh, chip, effort)
    plans.append(plan)
    log(
      f"{program.stage} {program.phase}: {plan.memory.total / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB, "
      f"compiled in {plan.compile_seconds:.0f} s"
    )


def plan_program(program: Program, mesh: Mesh, chip: Chip, effort: str) -> tuple[ProgramPlan, object]:
  """(the plan, abstract outputs with shardings) of one program."""
  start = time.perf_counter()
  with jax.set_mesh(mesh):
    traced = program.function.trace(*program.arguments)
    flags = [
      flag
      for argument, flag in zip(program.arguments, program.is_batch, strict=True)
      for _ in jax.tree.leaves(argument)
    ]
    work = cost.count(traced, flags, chip, mesh, program.trips)
    try:
      compiled = traced.lower().compile(compiler_options=EFFORTS[effort] or None)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      compiled, wanted = None, _wanted(str(error), chip)
  if compiled is None:
    arguments = bytes_per_device(program.arguments)
    held = max(program.alive_bytes - arguments, 0.0)
    memory = Memory(arguments, 0.0, max(wanted - arguments, 0.0), held, chip.hbm_bytes, wanted + held)
    outputs = jax.tree.map(lambda leaf: _place_rows(leaf, mesh), traced.out_info)
    found = []
  else:
    analysis = compiled.memory_analysis()
    code = analysis.generated_code_size_in_bytes
    # `jax.jit` drops unused arguments; they still occupy memory.
    held = max(program.alive_bytes - analysis.argument_size_in_bytes, 0.0)
    memory = Memory(
      analysis.argument_size_in_bytes,
      analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
      analysis.temp_size_in_bytes + code,
      held,
      chip.hbm_bytes,
      analysis.peak_memory_in_bytes + code + held,
    )
    outputs = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      traced.out_info,
      compiled.output_shardings,
    )
    found = collectives.collectives(compiled.as_text())
  table = collectives.summary(found)
  # A ring all-reduce transfers everything twice.
  link_bytes = sum(row["total_bytes"] * (2 if kind == "all-reduce" else 1) for kind, row in table.items())
  plan = ProgramPlan(
    program.stage,
    program.phase,
    memory,
    compiled is not None,
    work,
    table,
    link_bytes / chip.link_bandwidth,
    LEVERS[program.phase],
    time.perf_counter() - start,
  )
  return plan, outputs


def _wanted(message: str, chip: Chip) -> float:
  """Bytes that XLA's error message says it needed; the chip's limit if it does not say."""
  match = EXCEEDED.search(message)
  return float(match[1]) * UNITS[match[2].upper()] if match else chip.hbm_bytes


def _place_rows(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Shards an output that was not compiled: rows over the mesh if divisible, else replicated."""
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  place = batch_sharding(mesh) if leaf.ndim and leaf.shape[0] % rows == 0 else replicated(mesh)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def is_fitting(plans: Sequence[ProgramPlan]) -> bool:
  return all(plan.fits for plan in plans)

"""`uae-jax train`: one config, one workdir, every stage from the first net to the report.

Chapters: workdir and mesh; nets; stages, each with its loop, its evaluation and its checkpoint; report. The same
command again resumes.
"""

import argparse
import functools
from pathlib import Path
import sys

from uae_jax.training.order import stage_runs

USAGE = """usage: uae-jax train --config=FILE[:VARIANT] --workdir=DIR [--config.FIELD=VALUE ...]

Trains every stage of the config and writes checkpoints, metrics, evaluation and the report to DIR.
The same command on the same DIR resumes. Any field of the config is a flag: --config.pretrain.total_steps=500.
"""


def main(argv: list[str]) -> int:
  """Parses absl and ml_collections flags and trains."""
  if not argv or "--help" in argv or "-h" in argv:
    print(USAGE, end="")
    return 0
  from absl import flags
  from ml_collections import config_flags

  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "experiment", lock_config=True, flag_values=values)
  flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
  try:
    rest = values(["uae-jax train", *argv])[1:]
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise argparse.ArgumentError(None, " ".join(str(error).split())) from error
  if rest:
    raise argparse.ArgumentError(None, f"unknown argument {rest[0]!r}")
  for name in ("config", "workdir"):
    if getattr(values, name) is None:
      raise argparse.ArgumentError(None, f"--{name} is needed")
  train(values.config, Path(values.workdir))
  return 0


def train(config, workdir: Path) -> None:
  """Runs what is left of the config's stages, then writes the report.

  Args:
    config: `ml_collections.ConfigDict`.
    workdir: of the run; made if absent.

  Raises:
    ValueError: a foreign workdir, a changed config, an impossible setting; nothing already written is touched.
    NonFiniteError: the loss stopped being a number; the last good state is saved.
  """
  import jax

  from uae_jax import sharding
  from uae_jax.evaluation.stages import StageEvaluator
  from uae_jax.report.page import write_report
  from uae_jax.training import initial, loop
  from uae_jax.training.build import build
  from uae_jax.training.checkpoints import Checkpoints
  from uae_jax.training.metrics import MetricWriter
  from uae_jax.training.stage import make_stage, validate
  from uae_jax.training.workdir import open_workdir

  # 1. Workdir and mesh.
  validate(config)
  mesh = sharding.make_mesh(**config.mesh)
  plain_config = open_workdir(workdir, config)
  jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

  # 2. Nets.
  start = initial.read(config, mesh, workdir)
  built = build(config, start.sizes, start.processor, mesh)
  params = initial.make_params(config, built, start)
  del start  # the tree above holds what it needs

  # 3. Stages. A finished one is read, the first unfinished one resumed.
  evaluator = StageEvaluator(config, built.networks, built.processor, workdir)
  writer = MetricWriter(workdir, enabled=jax.process_index() == 0)
  try:
    with jax.set_mesh(mesh), loop.preemption_notice() as is_preempted:
      for number, (folder, name) in enumerate(stage_runs(config)):
        checkpoints = Checkpoints(workdir / "checkpoints" / folder)
        before, finished = params, checkpoints.restore_final(built.abstract_params)
        if finished is None:
          seed = 1000 * config.seed + number
          params = loop.run(
            make_stage(config, name, built, params, seed),
            config[name],
            folder,
            make_batches(config, name, built, seed),
            checkpoints,
            writer,
            plain_config,
            is_preempted,
            place=lambda batch: jax.device_put(batch, sharding.batch_sharding(mesh)),
            observe=functools.partial(evaluator.observe, folder) if name == "generation_for_understanding" else None,
            observe_every_steps=config.evaluation.caption_every_steps,
          )
          checkpoints.save_final(config[name].total_steps, params, plain_config)
        else:
          params = finished
        checkpoints.close()
        if not evaluator.is_done(folder):
          evaluator.evaluate(folder, name, params, before)
  except loop.Preempted as notice:
    print(f"preempted, {notice}: the same command resumes", file=sys.stderr)
    return
  finally:
    writer.close()

  # 4. Report.
  print(f"report: {write_report(workdir)}")


def make_batches(config, name: str, built, seed: int):
  """The endless training batches of a stage, this process's part."""
  import jax

  from uae_jax.data.pipeline import make_dataset

  return make_dataset(
    config.data,
    built.processor,
    split="train",
    captions=config[name].captions,
    batch_size=config[name].batch_size,
    seed=seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

"""`uae-jax train`: runs every stage of a config in one workdir and writes the report.

Sections: workdir and mesh; networks; stages, each with its loop, checkpoint and evaluation; report. Running the same
command again resumes.
"""

import dataclasses
import functools
from pathlib import Path
import sys
import time

from uae_jax.commands import compiler_flags, config_file
from uae_jax.commands.command_line import Parser, number, path
from uae_jax.options import Experiment

EPILOG = (
  "The same command on the same DIR resumes. Every field of the config is a flag: --config.pretrain.total_steps=500. "
  "For several processes, run the same command in each of them, on a DIR that all of them can access. On Cloud TPU, "
  "Slurm, Open MPI and Kubernetes the processes find each other; elsewhere give --coordinator, --num_processes and "
  "--process_id."
)


def parser() -> Parser:
  parser = Parser(
    "train", "Trains every stage of a config; writes checkpoints, metrics, figures and the report.", EPILOG
  )
  parser.add_argument(
    "--workdir", required=True, type=path, metavar="DIR", help="folder for checkpoints, metrics and the report"
  )
  parser.add_argument(
    "--accept_changed_data", action="store_true", help="resume although the data are not those of the last start"
  )
  parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
  parser.add_argument("--num_processes", type=number(int, at_least=1), metavar="N", help="number of processes")
  parser.add_argument("--process_id", type=number(int, at_least=0), metavar="I", help="index of this process, from 0")
  parser.add_argument(
    "--preempted_exit_code",
    type=number(int, at_least=0),
    default=0,
    metavar="N",
    help="exit code after SIGTERM and a save, for schedulers that restart only what failed (default: 0)",
  )
  return parser


def main(argv: list[str]) -> int:
  """Parses the arguments and trains."""
  arguments, config = config_file.parse(parser(), argv)
  compiler_flags.add(config)
  from uae_jax.training import processes

  processes.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
  is_finished = train(config, arguments.workdir, accepts_changed_data=arguments.accept_changed_data)
  return 0 if is_finished else arguments.preempted_exit_code


def train(config: Experiment, workdir: Path, *, accepts_changed_data: bool = False) -> bool:
  """Runs the stages of a config that are not finished, then writes the report.

  Args:
    config: stages, models and data.
    workdir: created if absent.
    accepts_changed_data: resume although the data are not those of the last start.

  Returns:
    Whether all stages are finished; False after SIGTERM, once the state is saved.

  Raises:
    ValueError: the workdir is not a run's, its config or data differ, or a setting is invalid; existing files are not
      touched.
    NonFiniteError: the loss became NaN or infinite; the last good state is saved.
    SaveError: a checkpoint could not be written; earlier ones are complete.
  """
  import jax

  from uae_jax import sharding
  from uae_jax.evaluation.evaluator import StageEvaluator
  from uae_jax.report.page import write_report
  from uae_jax.report.progress import record_start
  from uae_jax.training import initial, loop, processes
  from uae_jax.training.batches import Batches
  from uae_jax.training.build import build
  from uae_jax.training.checkpoints import Checkpoints
  from uae_jax.training.data_check import check_data, write_fingerprints
  from uae_jax.training.metrics import MetricWriter
  from uae_jax.training.preemption import Preempted, PreemptionNotice
  from uae_jax.training.profiling import Profiler
  from uae_jax.training.stage import make_stage, params_before
  from uae_jax.training.stages import spec
  from uae_jax.training.state import release
  from uae_jax.training.validate import validate
  from uae_jax.training.watchdog import Watchdog
  from uae_jax.training.workdir import open_workdir, to_plain

  began, flags = time.time(), compiler_flags.in_effect()

  # 1. Workdir and mesh.
  validate(config)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  processes.name_logs()

  def open_run():
    fingerprints = check_data(config, workdir, accepts_changes=accepts_changed_data)
    open_workdir(workdir, config)
    write_fingerprints(workdir, fingerprints)

  processes.on_first(open_run)
  plain_config = to_plain(config)
  if jax.config.values["jax_compilation_cache_dir"] is None:
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))

  # 2. Networks.
  start = initial.read(config, mesh, workdir)
  built = build(config, start.sizes, start.processor, mesh)
  params = initial.make_params(config, built, start)
  del start  # `params` holds what is needed of it

  # 3. Stages. Finished ones are restored, the first unfinished one resumes.
  evaluator = StageEvaluator(config, built.networks, built.processor, workdir, spec.find)
  writer = MetricWriter(
    workdir,
    enabled=jax.process_index() == 0,
    tensorboard=config.tensorboard,
    others=config.metric_writers,
    config=plain_config,
  )
  is_recorded = False
  watchdog = Watchdog(config.watchdog_seconds, workdir, jax.process_index())
  try:
    with jax.set_mesh(mesh), PreemptionNotice(mesh) as notice, watchdog:
      for number, (folder, name) in enumerate(config.runs):
        section = config.section(name)
        observes = (
          spec.find(name).observes_captions and config.evaluation.num_images and config.evaluation.caption_every_steps
        )
        checkpoints = Checkpoints(workdir / "checkpoints" / folder, config.checkpoints)
        before, finished = params_before(config, name, params), checkpoints.restore_final(built.abstract_params)
        if finished is None:
          if not is_recorded and jax.process_index() == 0:
            record_start(workdir, began, num_processes=jax.process_count(), num_devices=jax.device_count(), flags=flags)
          is_recorded = True
          seed = 1000 * config.seed + number
          stage = make_stage(config, name, built, params, seed)
          release(params, before)  # the state has its own copy
          with Profiler(workdir / "profile" / folder, **dataclasses.asdict(config.profile)) as profiler:
            params = loop.run(
              stage,
              section,
              folder,
              Batches(
                config,
                name,
                built.processor,
                mesh,
                seed,
                needs_captions=spec.find(name).needs_captions(section.options),
              ),
              checkpoints,
              writer,
              plain_config,
              notice,
              max_skipped_in_a_row=config.max_skipped_in_a_row,
              observe=functools.partial(evaluator.observe, folder) if observes else None,
              observe_every_steps=config.evaluation.caption_every_steps,
              profiler=profiler,
              watchdog=watchdog,
            )
          checkpoints.save_final(section.total_steps, params, plain_config)
        else:
          release(params, before)
          params = finished
        checkpoints.close()
        with notice.nothing_unsaved():
          if not processes.of_first(evaluator.is_done(folder)):
            evaluator.evaluate(folder, name, params, before)
  except Preempted as reason:
    print(f"preempted, {reason}: the same command resumes", file=sys.stderr)
    return False
  finally:
    writer.close()

  # 4. Report.
  if jax.process_index() == 0:
    print(f"report: {write_report(workdir)}")
  return True

"""`uae-jax train`: runs every stage of a config in one workdir and writes the report.

First everything that can be wrong with the config is checked. Then come networks; stages, each with its loop,
checkpoint and evaluation; report. Running the same command again resumes.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
from pathlib import Path
import sys
import time
from typing import TYPE_CHECKING

from uae_jax import outputs
from uae_jax.commands import command_line, compiler_flags, config_file
from uae_jax.commands.command_line import Parser, number, path
from uae_jax.options import Experiment

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from uae_jax.training.build import Built
  from uae_jax.training.sizes import Sizes

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
  command_line.add_process_arguments(parser)
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
    NonFiniteError: the loss became NaN or infinite; the last good state stays on disk.
    SaveError: a checkpoint could not be written; earlier ones are complete.
    KeyboardInterrupt: Ctrl-C; the state is saved.
  """
  import jax

  from uae_jax import sharding
  from uae_jax.evaluation import stage_suites
  from uae_jax.report.progress import record_start
  from uae_jax.training import processes
  from uae_jax.training.data_check import check_data, write_fingerprints
  from uae_jax.training.lock import WorkdirLock
  from uae_jax.training.rehearsal import rehearse
  from uae_jax.training.validate import validate
  from uae_jax.training.workdir import check_workdir, open_workdir

  began, flags = time.time(), compiler_flags.in_effect()
  fingerprints: dict[str, dict] = {}

  def check() -> None:
    check_workdir(workdir, config)
    outputs.require_folder(workdir, "--workdir")
    fingerprints.update(check_data(config, workdir, accepts_changes=accepts_changed_data))

  def open_run() -> None:
    open_workdir(workdir, config)
    write_fingerprints(workdir, fingerprints)

  def record() -> None:
    record_start(workdir, began, num_processes=jax.process_count(), num_devices=jax.device_count(), flags=flags)

  # 1. Everything that can be wrong with the config, before anything is written.
  validate(config)
  stage_suites.check(config)
  processes.name_logs()
  processes.on_first(check)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  sizes, built = rehearse(config, mesh)
  # 2. The run.
  processes.on_first(lambda: workdir.mkdir(parents=True, exist_ok=True))
  lock = WorkdirLock(workdir)
  with contextlib.ExitStack() as held:
    processes.on_first(lambda: held.enter_context(lock))
    processes.on_first(open_run)
    if jax.config.values["jax_compilation_cache_dir"] is None:
      jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))
    return run_stages(
      config, workdir, mesh, sizes, built, record=record, check_lock=lambda: processes.on_first(lock.check)
    )


def run_stages(
  config: Experiment,
  workdir: Path,
  mesh: "Mesh",
  sizes: "Sizes",
  built: "Built",
  *,
  record: Callable[[], None],
  check_lock: Callable[[], None],
) -> bool:
  """Runs the stages of a checked config in an open workdir, then writes the report.

  Args:
    config: config of the run.
    workdir: folder of the run, which holds its config.
    mesh: device mesh of the run.
    sizes: sizes of all networks before the weights were read, from `rehearsal.rehearse`.
    built: networks of these sizes.
    record: () -> None; process 0 calls it when training starts or resumes.
    check_lock: () -> None; raises if the workdir has another owner by now; called before every save.

  Returns:
    Whether all stages are finished.
  """
  import jax

  from uae_jax.api import UAE
  from uae_jax.evaluation.evaluator import StageEvaluator
  from uae_jax.report.page import write_report
  from uae_jax.training import initial, loop, processes, restore
  from uae_jax.training.batches import Batches
  from uae_jax.training.build import build
  from uae_jax.training.checkpoints import Checkpoints
  from uae_jax.training.metrics import MetricWriter
  from uae_jax.training.preemption import Preempted, PreemptionNotice
  from uae_jax.training.profiling import Profiler
  from uae_jax.training.stage import make_stage, params_before
  from uae_jax.training.stages import spec
  from uae_jax.training.state import release
  from uae_jax.training.watchdog import Watchdog
  from uae_jax.training.workdir import to_plain

  start = initial.read(config, mesh, workdir)
  # Embedders may have other sizes than the published ones.
  same = start.sizes == sizes
  built = (
    dataclasses.replace(built, processor=start.processor) if same else build(config, start.sizes, start.processor, mesh)
  )
  params = initial.make_params(config, built, start)
  uae = UAE(restore.of_run(workdir, config, built, start.sizes, {}), mesh)
  del start  # `params` holds what is needed of it
  plain_config = to_plain(config)

  # Finished stages are restored, the first unfinished one resumes.
  evaluator = StageEvaluator(config, built.networks, built.processor, workdir, spec.find, uae)
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
        section, evaluation = config.section(name), config.evaluation
        observers: list[tuple[int, loop.Observe]] = []
        if spec.find(name).observes_captions and evaluation.num_images and evaluation.caption_every_steps:
          observers.append((evaluation.caption_every_steps, functools.partial(evaluator.observe, folder)))
        if evaluation.periodic.every_steps:
          observers.append((evaluation.periodic.every_steps, functools.partial(evaluator.evaluate_during, name)))
        if evaluation.suites.names and spec.find(name).runs_suites:
          every_steps = evaluation.suites.every_steps or section.total_steps
          observers.append((every_steps, functools.partial(evaluator.evaluate_suites, folder)))
        checkpoints = Checkpoints(workdir / "checkpoints" / folder, config.checkpoints, before_save=check_lock)
        before, finished = params_before(config, name, params), checkpoints.restore_final(built.abstract_params)
        if finished is None:
          if not is_recorded and jax.process_index() == 0:
            record()
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
                workdir=workdir,
              ),
              checkpoints,
              writer,
              plain_config,
              notice,
              max_skipped_in_a_row=config.max_skipped_in_a_row,
              observers=observers,
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
    if notice.is_interrupt:
      raise KeyboardInterrupt(f"{reason}: the same command resumes") from None
    print(f"preempted, {reason}: the same command resumes", file=sys.stderr)
    return False
  finally:
    writer.close()

  # Report.
  if jax.process_index() == 0:
    print(f"report: {write_report(workdir)}")
  return True

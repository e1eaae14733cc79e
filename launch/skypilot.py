"""Runs a job with SkyPilot, as a managed job that finds capacity and comes back after a preemption: writes its task.

python -m launch.skypilot render one --config=configs/my.py --workdir=gs://my-bucket/runs/one --topology=v5e:4x4 --spot
python -m launch.skypilot launch one ...the same flags...
python -m launch.skypilot cancel one

Checked with SkyPilot 0.14. The code is this folder as it is, uncommitted changes too.
"""

import argparse
from collections.abc import Sequence
import sys

from launch import job as jobs
from launch.commands import LaunchError, run
from launch.far_side import export_secrets, join
from launch.job import BUCKET_FOLDER, PREEMPTED_EXIT_CODE, ROOT, Job, Parser
from launch.worker_scripts import INSTALL
from launch.yaml_text import dump


def task(job: Job) -> dict:
  """SkyPilot's task; variables of the local environment are its secrets, whose values it asks from us at launch."""
  shape = job.shape
  accelerator = f"tpu-{shape.accelerator_type}"
  resources = {
    "infra": f"gcp/{job.zone.rpartition('-')[0]}/{job.zone}" if job.zone else "gcp",
    "accelerators": f"{accelerator}:1",
    "accelerator_args": {"tpu_vm": True, "runtime_version": shape.generation.runtime},
    "use_spot": job.spot,
    "job_recovery": {"max_restarts_on_errors": job.max_restarts, "recover_on_exit_codes": [PREEMPTED_EXIT_CODE]},
  }
  program, *arguments = job.command
  setup = "set -e\nln -sfn ~/sky_workdir ~/uae_jax\n" + INSTALL
  start = f"{export_secrets(job)}\nexec ~/uae_venv/bin/{program} {join(arguments)}\n".lstrip()
  found: dict = {"name": job.name, "workdir": str(ROOT), "num_nodes": 1, "resources": resources}
  if job.bucket:
    found["file_mounts"] = {BUCKET_FOLDER: {"source": f"gs://{job.bucket}", "mode": "MOUNT"}}
  found |= {"envs": job.literal_env} if job.literal_env else {}
  found |= {"secrets": dict.fromkeys(job.local_env_names)} if job.local_env_names else {}
  return found | {"setup": setup, "run": start}


def launch(job: Job, args: argparse.Namespace) -> None:
  """Submits the managed job.

  Raises:
    LaunchError: it failed; the message says if a job may run.
  """
  text = dump([task(job)])
  file = ROOT / "build" / f"{job.name}.sky.yaml"
  command = ["sky", "jobs", "launch", "--yes", "--detach-run", *(f"--secret={name}" for name in job.local_env_names)]
  print(job.shape.cost(1), file=sys.stderr)
  if args.dry_run:
    print(f"cat > {file} <<'END'\n{text}END")
  else:
    job.local_env()
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
  try:
    run("launch", [*command, str(file)], is_dry=args.dry_run)
  except LaunchError as error:
    raise LaunchError(f"{error}. Look with `sky jobs queue` whether {job.name} runs; cancel ends it") from error


def parser() -> argparse.ArgumentParser:
  common = Parser(add_help=False)
  jobs.add_place(common)
  top = Parser(prog="skypilot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
  for name, summary in (("render", "write the task to stdout"), ("launch", "submit it as a managed job")):
    command = commands.add_parser(name, help=summary, parents=[common])
    jobs.add_capacity(command)
    jobs.add_training(command)
    jobs.add_bucket(command)
    command.add_argument("--max-restarts", type=jobs.natural, default=20, help="after failures")
  commands.add_parser("cancel", help="end the job and delete its slice", parents=[common])
  return top


def check(args: argparse.Namespace, job: Job) -> str | None:
  if job.num_slices > 1:
    return "SkyPilot does not connect several slices: take launch.jobset, launch.xpk or launch.tpu_vm --slices"
  if job.flex_start or job.reservation:
    return "SkyPilot takes capacity on demand or --spot"
  if job.slice and (job.slice.generation.runtime is None or not job.slice.is_default_shape):
    return f"SkyPilot has no Cloud TPU VM {job.slice}"
  return jobs.no_kubernetes(job) or jobs.no_bucket(job)


def execute(args: argparse.Namespace, job: Job) -> None:
  if args.command != "cancel":
    jobs.refuse_literal_secrets(job)
    jobs.warn_of_loss(job)
  if args.command == "render":
    print(dump([task(job)]), end="")
  elif args.command == "launch":
    launch(job, args)
  else:
    run("cancel", ["sky", "jobs", "cancel", "--yes", "--name", job.name], is_dry=args.dry_run)


def main(argv: Sequence[str] | None = None) -> int:
  return jobs.main(parser(), argv, check, execute, "look with `sky jobs queue` for what runs")


if __name__ == "__main__":
  sys.exit(main())

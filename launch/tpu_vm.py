"""Manages Cloud TPU VMs from a terminal: create slices, install, train on all workers, watch, resume, delete.

python -m launch.tpu_vm create mine --zone=us-west4-a --topology=v5e:4x4 --spot
python -m launch.tpu_vm setup  mine --zone=us-west4-a --bucket=my-bucket
python -m launch.tpu_vm start  mine --zone=us-west4-a -- --config=configs/scenes.py --workdir=/mnt/bucket/runs/one
python -m launch.tpu_vm delete mine --zone=us-west4-a

A thin wrapper of `gcloud compute tpus`; --dry-run prints the commands without running them. Several slices
(--slices=2) are one queued resource. docs/launch walks through all steps from project to deletion.
"""

import argparse
from collections.abc import Sequence
import sys

from launch import job as jobs
from launch import tpu_run
from launch.commands import with_retries
from launch.job import Job, Parser
from launch.tpu_slice import TpuSlice


def parser() -> argparse.ArgumentParser:
  common, creation, code, training, patience = (Parser(add_help=False) for _ in range(5))
  jobs.add_place(common)
  common.add_argument("--queued", action="store_true", help="the slices are nodes of a queued resource of this name")
  common.add_argument("--batch-size", type=jobs.count, help="workers per ssh batch (default: all); needs gcloud alpha")
  common.add_argument("--internal-ip", action="store_true", help="the workers have internal addresses only")
  common.add_argument("--backoff-seconds", type=jobs.seconds, default=30.0, help="wait before the first retry; doubles")

  jobs.add_capacity(creation)
  creation.add_argument("--runtime-version", type=jobs.resource, help="default: depends on the generation")
  creation.add_argument(
    "--valid-until-duration", type=jobs.duration, metavar="TIME", help="give up queueing after this time, such as 6h"
  )
  creation.add_argument(
    "--create-flag",
    action="append",
    default=[],
    type=jobs.matching(r"--[a-z](?s:.*)", "a flag, such as --network=default"),
    metavar="FLAG",
    help="extra flag for gcloud's create",
  )

  code.add_argument("--ref", type=jobs.revision, default="HEAD", help="commit to install (default: HEAD)")
  code.add_argument(
    "--repository", type=jobs.repository, help="URL to clone on the workers; default: copy the local repository"
  )

  patience.add_argument("--poll-seconds", type=jobs.seconds, default=60.0)
  patience.add_argument(
    "--max-retries", type=jobs.natural, default=10, help="consecutive retries of passing errors: stock-outs, ssh"
  )

  top = Parser(prog="tpu_vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

  def add(name: str, summary: str, *parents: Parser) -> Parser:
    added = commands.add_parser(name, help=summary, description=summary, parents=[common, *parents])
    if creation not in parents:
      added.add_argument("--slices", dest="num_slices", type=jobs.count, default=1, help="as in create")
    return added

  def add_grace(command: argparse.ArgumentParser) -> None:
    command.add_argument(
      "--grace-seconds", type=jobs.count, default=jobs.GRACE_SECONDS, help="time from SIGTERM to SIGKILL"
    )

  jobs.add_training(training)
  add("create", "create slices, or queue for them", creation).add_argument(
    "--max-retries", type=jobs.natural, default=0
  )
  jobs.add_bucket(add("setup", "install code and packages on every worker", code))
  jobs.add_bucket(add("start", "start `uae-jax train` on every worker; its flags may follow --", training))
  tail = add("tail", "show the log of a worker")
  tail.add_argument("--node", type=jobs.matching(r"\d+", "a number"), default="0", help="of several slices")
  tail.add_argument("--worker", type=jobs.matching(r"\d+|all", "a number or all"), default="0")
  tail.add_argument("--lines", type=jobs.count, default=50)
  tail.add_argument("--follow", action="store_true")
  add("status", "state of the slices and of the run on every worker")
  resumer = add("resume", "bring the slices up, recreating them, and start", creation, code, training, patience)
  watcher = add("watch", "resume whenever preempted, until finished", creation, code, training, patience)
  watcher.add_argument("--max-restarts", type=jobs.natural, default=20)
  watcher.add_argument("--delete", action="store_true", help="delete the slices once training has finished")
  for command in (resumer, watcher):
    jobs.add_bucket(command)
    add_grace(command)
  add_grace(add("stop", "save and end the run; the slices keep running"))
  add("delete", "delete the slices").add_argument("--async", action="store_true", dest="is_async")
  return top


def is_queued(args: argparse.Namespace, job: Job) -> bool:
  return args.queued or job.num_slices > 1 or job.flex_start


def check(args: argparse.Namespace, job: Job) -> str | None:
  if job.slice and job.slice.generation.runtime is None:
    return f"Cloud TPU VMs do not come as {job.slice.generation.name}; GKE has it: python -m launch.jobset"
  if job.flex_start and not job.max_run_duration:
    return "--flex-start needs --max-run-duration"
  if getattr(args, "valid_until_duration", None) and not is_queued(args, job):
    return "--valid-until-duration is for --queued"
  # `start` relies on what `setup` has mounted.
  return jobs.no_kubernetes(job) or (jobs.no_bucket(job) if args.command in ("resume", "watch") else None)


def execute(args: argparse.Namespace, job: Job) -> None:
  target = TpuSlice(job, is_queued(args, job), args.dry_run, args.backoff_seconds, args.batch_size, args.internal_ip)
  if args.command in ("resume", "watch"):
    jobs.warn_of_loss(job)
  if args.command == "create":
    with_retries(lambda: target.create(args), retries=args.max_retries, backoff_seconds=args.backoff_seconds)
  elif args.command == "setup":
    tpu_run.setup(target, args)
  elif args.command == "start":
    tpu_run.start(target)
  elif args.command == "tail":
    follow = " -F" if args.follow else ""
    script = f"tail -n {args.lines}{follow} ~/uae_run/log"
    target.ssh("tail", script, worker=args.worker, node=args.node)
  elif args.command == "status":
    tpu_run.status(target)
  elif args.command == "resume":
    with_retries(lambda: tpu_run.resume(target, args), retries=args.max_retries, backoff_seconds=args.backoff_seconds)
  elif args.command == "watch":
    tpu_run.watch(target, args)
  elif args.command == "stop":
    tpu_run.stop(target)
  else:
    target.delete(must_exist=True, is_async=args.is_async)


def main(argv: Sequence[str] | None = None) -> int:
  return jobs.main(parser(), argv, check, execute, "what was created keeps running and is being billed")


if __name__ == "__main__":
  sys.exit(main())

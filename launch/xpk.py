"""Runs a job with XPK, Google's tool for GKE clusters with TPUs: writes its command lines and runs them.

python -m launch.xpk create one --cluster=tpus --config=configs/my.py --workdir=gs://my-bucket/runs/one \\
  --topology=v5e:4x4 --slices=2 --image=us-docker.pkg.dev/lab/images/uae-jax:v1 --dry-run
python -m launch.xpk list   one --cluster=tpus
python -m launch.xpk delete one --cluster=tpus

Checked with XPK 1.16. The bucket is the storage of XPK that has its name.
"""

import argparse
from collections.abc import Sequence
import json
import re
import sys

from launch import job as jobs
from launch.commands import EXISTS, LaunchError, run
from launch.far_side import script
from launch.job import BUCKET_FOLDER, Job, Parser
from launch.jobset import escape

MAX_NAME = 40


def storage(job: Job) -> str:
  """XPK's name of the bucket, which is mounted by name."""
  return re.sub(r"[._]", "-", job.bucket or "")


def workload(job: Job) -> list[str]:
  """Arguments of `xpk workload create`."""
  shape = job.shape
  return [
    f"--workload={job.name}",
    # With the shape in its name, a type is unambiguous.
    f"--tpu-type={shape.generation.type_prefix}-{shape.topology}",
    f"--num-slices={job.num_slices}",
    f"--docker-image={job.image}",
    f"--command={escape(script(job))}",
    # XPK pastes values between double quotes into YAML.
    *(f"--env={name}={json.dumps(escape(value))[1:-1]}" for name, value in job.literal_env.items()),
    f"--max-restarts={job.max_restarts}",
    f"--termination-grace-period-seconds={job.grace_seconds}",
    *([f"--storage={storage(job)}"] if job.bucket else []),
    *(["--spot"] if job.spot else []),
    *(["--flex"] if job.flex_start else []),
    *([f"--reservation={job.reservation}"] if job.reservation else []),
  ]


def create(job: Job, args: argparse.Namespace) -> None:
  """Attaches the bucket to the cluster, if it is not, and creates the workload.

  Raises:
    LaunchError: a step failed; the workload was not created, or the message says that it may have been.
  """
  jobs.refuse_literal_secrets(job)
  jobs.warn_of_loss(job)
  print(job.shape.cost(job.num_slices), file=sys.stderr)
  if job.bucket:
    # The size is a formality of Kubernetes: a bucket has none.
    words = [storage(job), f"--bucket={job.bucket}", "--type=gcsfuse", "--size=1", "--auto-mount=false"]
    try:
      xpk(args, "storage", "attach", [*words, "--readonly=false", f"--mount-point={BUCKET_FOLDER}"])
    except LaunchError as error:
      if error.cause is not EXISTS:
        raise
  try:
    xpk(args, "workload", "create", workload(job))
  except LaunchError as error:
    if not error.is_passing:
      raise
    message = f"{error}. The workload {job.name} may exist and hold its TPUs: look with list, end it with delete"
    raise LaunchError(message, error.cause) from error


def xpk(args: argparse.Namespace, kind: str, verb: str, words: Sequence[str]) -> None:
  place = [f"--{key}={value}" for key in ("cluster", "project", "zone") if (value := getattr(args, key))]
  print(run(verb, ["xpk", kind, verb, *words, *place], is_dry=args.dry_run, captures=True), end="")


def parser() -> argparse.ArgumentParser:
  common = Parser(add_help=False)
  jobs.add_place(common)
  common.add_argument("--cluster", type=jobs.name, required=True, help="name of the GKE cluster")
  top = Parser(prog="xpk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
  creator = commands.add_parser("create", help="attach the bucket and create the workload", parents=[common])
  jobs.add_capacity(creator)
  jobs.add_training(creator)
  jobs.add_bucket(creator)
  jobs.add_container(creator)
  for name, summary in (("list", "state of the workload"), ("delete", "delete the workload")):
    commands.add_parser(name, help=summary, parents=[common])
  return top


def check(args: argparse.Namespace, job: Job) -> str | None:
  if len(job.name) > MAX_NAME:
    return f"{job.name}: XPK's names have at most {MAX_NAME} characters"
  if name := next(iter(job.local_env_names), None):
    return f"--env={name}: XPK would show its value to all who may read JobSets; give --secret={name}=projects/..."
  if job.max_run_duration:
    return f"--max-run-duration: {jobs.OF_THE_POOL}"
  if job.slice and job.shape.generation.name == "v5e" and job.shape.num_chips < 8:
    return f"XPK has no slice {job.slice}: take launch.jobset"
  return jobs.no_kubernetes(job) or jobs.no_bucket(job)


def execute(args: argparse.Namespace, job: Job) -> None:
  if args.command == "create":
    create(job, args)
  elif args.command == "list":
    xpk(args, "workload", "list", [f"--filter-by-job=^{job.name}$"])
  else:
    xpk(args, "workload", "delete", [f"--workload={job.name}", "--force"])


def main(argv: Sequence[str] | None = None) -> int:
  return jobs.main(parser(), argv, check, execute, "the workload may exist: look with list, end it with delete")


if __name__ == "__main__":
  sys.exit(main())

"""Builds and pushes the container image of a commit.

python -m launch.image build --image=us-docker.pkg.dev/my-project/images/uae-jax:v1
python -m launch.image push  --image=us-docker.pkg.dev/my-project/images/uae-jax:v1
python -m launch.image lock     # after a change of setup.py: the packages and their hashes, launch/requirements.txt
"""

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import re
import sys
import tempfile

from launch import job as jobs
from launch.commands import run
from launch.job import ROOT

REQUIREMENTS = ROOT / "launch" / "requirements.txt"


def build(args: argparse.Namespace) -> None:
  """Builds from a commit, so that neither uncommitted changes nor files that git ignores get into the image."""
  with tempfile.TemporaryDirectory() as folder:
    archive = Path(folder) / "context.tar"
    run("build", ["git", "-C", str(ROOT), "archive", f"--output={archive}", args.ref], is_dry=args.dry_run)
    context = Path(folder) / "context"
    context.mkdir()
    run("build", ["tar", "-xf", str(archive), "-C", str(context)], is_dry=args.dry_run)
    command = ["docker", "build", "--platform=linux/amd64", f"--tag={args.image}", str(context)]
    run("build", command, is_dry=args.dry_run)


def lock(args: argparse.Namespace) -> None:
  """Resolves the packages inside the base image and writes one exact version and hash for each."""
  base = re.search(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
  assert base is not None
  pip = ["pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report=-", "/src[tpu]", "setuptools"]
  command = ["docker", "run", "--rm", "--platform=linux/amd64", f"--volume={ROOT}:/src", base[1], *pip]
  text = run("lock", command, is_dry=args.dry_run, captures=True)
  if not args.dry_run:
    REQUIREMENTS.write_text(pinned(json.loads(text)))


def pinned(report: dict) -> str:
  """The requirements file of pip's report of an installation."""
  rows = []
  for item in report["install"]:
    hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
    if "sha256" in hashes:  # all but uae_jax itself
      rows.append(f"{item['metadata']['name'].lower()}=={item['metadata']['version']} --hash=sha256:{hashes['sha256']}")
  return "# Written by `python -m launch.image lock`.\n" + "".join(f"{row}\n" for row in sorted(rows))


def main(argv: Sequence[str] | None = None) -> int:
  top = jobs.Parser(prog="image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, parser_class=jobs.Parser, metavar="COMMAND")
  for name in ("build", "push", "lock"):
    command = commands.add_parser(name)
    command.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    if name != "lock":
      command.add_argument("--image", type=jobs.image, required=True)
    if name == "build":
      command.add_argument("--ref", type=jobs.revision, default="HEAD", help="commit to build (default: HEAD)")
  args = top.parse_args(argv)
  push = lambda args: run("push", ["docker", "push", args.image], is_dry=args.dry_run)  # noqa: E731
  execute = {"build": build, "push": push, "lock": lock}[args.command]
  return jobs.reported("image", lambda: execute(args), "nothing runs")


if __name__ == "__main__":
  sys.exit(main())

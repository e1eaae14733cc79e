#!/usr/bin/env python3
"""A fake gcloud: a slice of two workers, which are folders that serve as homes of the scripts that run on them.

$FAKE contains `calls.jsonl` (the arguments of every call), `plan.json` (verb -> answers, one per call; null for the
default answer) and `state` (state of the nodes; `state-NAME` of one of them). An answer is {"exit", "stdout",
"stderr", "state"}, each optional: `state` is set before the default answer, `exit` replaces it.
"""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys

FAKE = Path(os.environ["FAKE"])
WORKERS = ("worker-0", "worker-1")


def fail(message: str, code: int = 1):
  print(message, file=sys.stderr)
  sys.exit(code)


def flag(name: str) -> str | None:
  return next((word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}=")), None)


def take_away():
  """Deletes the workers and kills everything that runs on them."""
  for worker in WORKERS:
    pid = FAKE / worker / "uae_run" / "pid"
    if pid.exists():
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass
    shutil.rmtree(FAKE / worker, ignore_errors=True)


def on_worker(worker: str, script: str) -> int:
  environment = os.environ | {"HOME": str(FAKE / worker), "USER": "tester"}
  return subprocess.run(["bash", "-c", script], env=environment, check=False).returncode


def main():
  words = [word for word in sys.argv[1:] if word != "alpha"]
  kind, verb, name = words[2:5]
  with (FAKE / "calls.jsonl").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")
  plan = json.loads((FAKE / "plan.json").read_text())
  answer = (plan.get(verb) or [None]).pop(0) or {}
  (FAKE / "plan.json").write_text(json.dumps(plan))
  state = FAKE / "state"
  if "state" in answer:
    state.write_text(answer["state"])
  if "exit" in answer:
    fail(answer.get("stderr", ""), answer["exit"])
  if "stdout" in answer:
    print(answer["stdout"])
    return
  if verb == "create":
    for worker in WORKERS:
      (FAKE / worker).mkdir()
    state.write_text("READY")
  elif verb == "describe":
    if not state.exists():
      fail(f'ERROR: (gcloud.compute.tpus.{kind}.describe) NOT_FOUND: Resource "nodes/{name}" was not found')
    own = FAKE / f"state-{name}"
    print("ACTIVE" if kind == "queued-resources" else (own if own.exists() else state).read_text())
  elif verb == "delete":
    if not state.exists():
      fail(f'ERROR: (gcloud.compute.tpus.{kind}.delete) NOT_FOUND: Resource "nodes/{name}" was not found')
    take_away()
    state.unlink(missing_ok=True)
  elif state.read_text() != "READY":
    fail(f'ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) This TPU has terminal state "{state.read_text()}".')
  elif verb == "scp":
    for worker in WORKERS:
      shutil.copy(words[4], FAKE / worker / words[5].partition(":")[2])
  elif verb == "ssh":
    chosen = WORKERS if flag("worker") == "all" else (WORKERS[int(flag("worker"))],)
    codes = [on_worker(worker, flag("command")) for worker in chosen]
    for worker, code in zip(chosen, codes, strict=True):
      if code and len(chosen) > 1:
        print(f"##### Command execution on {worker} failed with exit status {code}. Continuing.", file=sys.stderr)
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
  main()

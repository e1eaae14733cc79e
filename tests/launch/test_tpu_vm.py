"""The launcher prints its commands, survives stock-outs, lost connections and preemption, and explains other errors.

gcloud is a fake; the launcher's scripts really run, on folders that serve as the workers' homes.
"""

from concurrent.futures import ThreadPoolExecutor
import json
import os
from pathlib import Path
import shlex
import subprocess
import sys
import time

import pytest

from launch import tpu_run, tpu_vm
from launch.job import HUNG_EXIT_CODE
from tests.launch.far_side import HOSTILE
from uae_jax.training import watchdog

REPOSITORY = Path(__file__).parents[2]
FAKE_GCLOUD = Path(__file__).with_name("fake_gcloud.py")
PLACE = ["--zone=us-west4-a", "--project=lab"]
NEW = ["--accelerator-type=v5litepod-16", "--spot"]
FAST = ["--backoff-seconds=0.01"]
PATIENT = [*FAST, "--poll-seconds=0.3"]
TRAIN = ["--", "--config=configs/scenes.py:smoke", "--workdir=/mnt/bucket/runs/one", "--config.note=two words"]
# No bucket has to be mounted for this one.
ON_DISK = ["--", "--config=configs/scenes.py:smoke", "--workdir=/data/runs/one"]

STOCK_OUT = """ERROR: (gcloud.compute.tpus.tpu-vm.create) {
  "code": 8,
  "message": "There is no more capacity in the zone \\"us-west4-a\\"; you can try in another zone"
}"""

# Programs of the workers, real or fake.
PROGRAMS = {
  "hostname": 'basename "$HOME"',
  "mountpoint": "exit 1",
  "gcsfuse": 'echo "$@" > ~/mounted',
  "sudo": "exit 0",
  "python3": 'printf "%s" "value of $3"',
  "uv": """
if [ "$1" = venv ]; then
  mkdir -p ~/uae_venv/bin
  cp "$FAKE/bin/uae-jax" ~/uae_venv/bin
  ln -s /bin/true ~/uae_venv/bin/python
else
  echo "$@" > ~/installed
fi""",
  "uae-jax": """
printf '%s\\n' "$PWD" "$NOTE" "$@" > ~/arguments
printf '%s\\0' "$NOTE" "$HF_TOKEN" "$TOKEN" "$@" > ~/words
if [ -e "$FAKE/crash" ]; then echo broken; exit 7; fi
if [ -e "$FAKE/hang" ]; then sleep 1; rm -f "$FAKE/hang"; exit 175; fi
if [ -e "$FAKE/finish" ]; then echo "report: index.html"; exit 0; fi
trap 'echo "preempted, saved at step 3: the same command resumes"; exit 0' TERM
echo training
sleep 60 & wait""",
}


class Cloud:
  """The folder of the fake gcloud."""

  def __init__(self, folder: Path):
    self.folder = folder

  def plan(self, **answers):
    (self.folder / "plan.json").write_text(json.dumps(answers))

  def calls(self) -> list[list[str]]:
    file = self.folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def verbs(self) -> list[str]:
    return [[word for word in call if word != "alpha"][3] for call in self.calls()]

  def read(self, path: str) -> str:
    return (self.folder / path).read_text()


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  folder = tmp_path / "cloud"
  programs = folder / "bin"
  programs.mkdir(parents=True)
  for name, body in PROGRAMS.items() | {("gcloud", f'exec {sys.executable} -I -S {FAKE_GCLOUD} "$@"')}:
    (programs / name).write_text(f"#!/bin/bash\n{body}\n")
    (programs / name).chmod(0o755)
  repository = tmp_path / "repository"
  repository.mkdir()
  (repository / "setup.py").write_text("committed")
  git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b"]
  for command in (["init", "-q"], ["add", "setup.py"], ["commit", "-q", "-m", "one"]):
    subprocess.run([*git, *command], check=True)
  monkeypatch.setattr(tpu_run, "ROOT", repository)
  monkeypatch.setenv("FAKE", str(folder))
  monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
  cloud = Cloud(folder)
  cloud.plan()
  yield cloud
  subprocess.run(["gcloud", "compute", "tpus", "tpu-vm", "delete", "mine"], check=False)


def launch(command: str, *flags: str) -> int:
  return tpu_vm.main([command, "mine", *PLACE, *flags])


def brought_up(cloud):
  assert launch("create", *NEW) == 0
  assert launch("setup") == 0


def is_soon(condition, seconds=60.0) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()


def is_training(cloud, worker: str) -> bool:
  log = cloud.folder / worker / "uae_run/log"
  return log.exists() and "training" in log.read_text()


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (NEW, "tpu-vm create mine --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot"),
    (["--accelerator-type=v6e-16"], "tpu-vm create mine --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e"),
    (
      ["--accelerator-type=v5p-8", "--queued", "--valid-until-duration=6h", "--create-flag=--labels=team=a"],
      "queued-resources create mine --node-id=mine --accelerator-type=v5p-8 --runtime-version=v2-alpha-tpuv5 "
      "--labels=team=a --valid-until-duration=6h",
    ),
  ],
)
def test_create_is_one_gcloud_command(cloud, flags, expected):
  assert launch("create", *flags) == 0
  assert " ".join(cloud.calls()[0]) == f"compute tpus {expected} --zone=us-west4-a --project=lab --quiet"


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
  flags = [*PLACE, *NEW, "--bucket=my-bucket", "--delete", "--dry-run", *TRAIN]
  command = [sys.executable, "-m", "launch.tpu_vm", "watch", "mine", *flags]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
  assert cloud.calls() == []
  # The printed commands are valid shell commands.
  words = shlex.split(done.stdout, comments=True)
  runs = " ".join(words).split("gcloud compute tpus ")[1:]
  assert [" ".join(run.split()[:2]) for run in runs] == [
    *("tpu-vm describe", "tpu-vm delete", "tpu-vm create", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm scp"),
    *("tpu-vm ssh", "tpu-vm ssh", "tpu-vm delete"),
  ]
  assert "gcsfuse --implicit-dirs my-bucket /mnt/bucket" in runs[5]
  assert "uae-jax train --config=configs/scenes.py:smoke" in runs[7] and "'--config.note=two words'" in runs[7]


def test_setup_copies_the_commit_to_every_worker(cloud, capsys):
  (tpu_run.ROOT / "setup.py").write_text("changed since")
  assert launch("create", *NEW) == 0
  assert launch("setup", "--bucket=my-bucket") == 0
  for worker in ("worker-0", "worker-1"):
    assert cloud.read(f"{worker}/uae_jax/setup.py") == "committed"
    assert cloud.read(f"{worker}/installed").strip().endswith(f"--editable={cloud.folder}/{worker}/uae_jax[tpu]")
    assert cloud.read(f"{worker}/mounted").strip() == "--implicit-dirs my-bucket /mnt/bucket"
  assert "uncommitted changes are not copied" in capsys.readouterr().err


def test_setup_can_clone(cloud):
  assert launch("create", *NEW) == 0
  assert launch("setup", f"--repository={tpu_run.ROOT}", "--ref=HEAD") == 0
  assert cloud.read("worker-1/uae_jax/setup.py") == "committed"
  assert "scp" not in cloud.verbs()


def test_it_needs_the_standard_library_only():
  command = [sys.executable, "-S", "-m", "launch.tpu_vm", "--help"]
  assert "gcloud" in subprocess.check_output(command, text=True, cwd=REPOSITORY)


def test_a_run_starts_on_every_worker_once_and_ends_in_order(cloud, capfd):
  brought_up(cloud)
  assert launch("start", "--env=NOTE=a b", *TRAIN) == 0
  assert is_soon(lambda: all(is_training(cloud, worker) for worker in ("worker-0", "worker-1")))
  for worker in ("worker-0", "worker-1"):
    folder, *arguments = cloud.read(f"{worker}/arguments").splitlines()
    assert folder == f"{cloud.folder}/{worker}/uae_jax"
    assert arguments == ["a b", "train", *TRAIN[1:]]
  capfd.readouterr()
  assert launch("start", *TRAIN) == 0
  assert "worker-0: already running\n" in capfd.readouterr().out
  assert launch("setup") == 1
  assert "a run is going on, stop it first" in capfd.readouterr().err
  assert launch("status") == 0
  assert "  worker-1: running\n" in capfd.readouterr().out
  assert launch("stop") == 0
  assert launch("status") == 0
  assert "  worker-1: preempted\n" in capfd.readouterr().out
  assert cloud.read("worker-0/uae_run/exit_code").strip() == "0"


def test_words_with_shell_syntax_arrive_intact_and_no_value_is_shown(cloud, capfd, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_1234")
  brought_up(cloud)
  note = "s3cret " + HOSTILE[0]
  variables = [f"--env=NOTE={note}", "--env=HF_TOKEN", "--secret=TOKEN=projects/p/secrets/s"]
  assert launch("start", *variables, *TRAIN, *HOSTILE) == 0
  assert is_soon(lambda: all(is_training(cloud, worker) for worker in ("worker-0", "worker-1")))
  for worker in ("worker-0", "worker-1"):
    words = cloud.read(f"{worker}/words").split("\0")[:-1]
    assert words[:3] == [note, "hf_1234", "value of projects/p/secrets/s/versions/latest"]
    assert words[4:] == [*TRAIN[1:], *HOSTILE]
    assert not (cloud.folder / worker / ".uae_env").exists()
  processes = [words for file in Path("/proc").glob("[0-9]*/cmdline") if b"train" in (words := command_line(file))]
  assert any(b"--config.list=(1,2)" in words for words in processes)
  shown = json.dumps(cloud.calls()).encode() + "".join(capfd.readouterr()).encode() + b"".join(processes)
  assert b"hf_1234" not in shown and b"s3cret" not in shown


def command_line(file: Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError:  # the process has ended
    return b""


def test_the_file_of_variables_is_for_its_owner_only(cloud, monkeypatch):
  modes = []
  record = lambda self, step, file, target: modes.append(file.stat().st_mode & 0o777)  # noqa: E731
  monkeypatch.setattr(tpu_run.TpuSlice, "copy", record)
  (cloud.folder / "state").write_text("PREEMPTED")
  launch("start", "--env=NOTE=1", *FAST, *TRAIN)
  assert modes == [0o600]


def test_several_slices_are_one_queued_resource(cloud, capfd):
  slices = ["--slices=2"]
  assert launch("create", *NEW, *slices) == 0
  create = cloud.calls()[0]
  assert create[:6] == ["alpha", "compute", "tpus", "queued-resources", "create", "mine"]
  assert {"--node-prefix=mine", "--node-count=2", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
  assert launch("setup", *slices) == 0
  assert launch("start", *slices, *TRAIN) == 0
  for call in cloud.calls()[1:]:
    assert call[3] == "queued-resources" and "--node=all" in call
  capfd.readouterr()
  assert launch("status", *slices) == 0
  assert "  worker-1: running\n" in capfd.readouterr().out
  (cloud.folder / "state-mine-1").write_text("PREEMPTED")
  assert launch("status", *slices) == 0
  assert capfd.readouterr().out == "mine: PREEMPTED\n"


def test_flex_start_queues_for_a_time(cloud):
  assert launch("create", "--topology=v6e:4x4", "--flex-start", "--max-run-duration=10h") == 0
  words = cloud.calls()[0]
  assert words[:5] == ["alpha", "compute", "tpus", "queued-resources", "create"]
  assert {"--provisioning-model=flex-start", "--max-run-duration=10h", "--node-id=mine"} <= set(words)


def test_a_shape_that_is_not_the_default_is_given_by_name(cloud):
  assert launch("create", "--topology=v5p:4x4x16", "--reservation=lab") == 0
  assert {"--type=v5p", "--topology=4x4x16", "--reserved"} <= set(cloud.calls()[0])


def test_status_and_tail_speak_of_the_workers(cloud, capfd):
  assert launch("status") == 0
  assert "mine: ABSENT" in capfd.readouterr().out
  brought_up(cloud)
  (cloud.folder / "crash").touch()
  launch("start", *TRAIN)
  codes = [cloud.folder / worker / "uae_run/exit_code" for worker in ("worker-0", "worker-1")]
  assert is_soon(lambda: all(code.exists() for code in codes))
  codes[1].unlink()
  (cloud.folder / "worker-1/uae_run/pid").write_text("999999999")
  capfd.readouterr()
  assert launch("status") == 0
  assert capfd.readouterr().out == "mine: READY\n  worker-0: failed 7\n  worker-1: lost\n"
  assert launch("tail", "--worker=0") == 0
  assert capfd.readouterr().out == "broken\n"


def test_watch_outlives_a_stock_out_a_dropped_connection_and_a_preemption(cloud, capsys):
  dropped = {
    "exit": 255,
    "stderr": "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].",
  }
  cloud.plan(
    create=[{"exit": 1, "stderr": STOCK_OUT}],
    ssh=[dropped],
    # ABSENT at first and before both attempts to create it, READY after the second, then once seen in training.
    describe=[None, None, None, None, None, {"state": "PREEMPTED"}],
  )
  with ThreadPoolExecutor() as pool:
    watching = pool.submit(launch, "watch", *NEW, *PATIENT, "--delete", *ON_DISK)
    assert is_soon(lambda: is_training(cloud, "worker-0"))
    (cloud.folder / "finish").touch()  # The run on the next slice finishes at once.
    assert watching.result(timeout=60) == 0
  errors = capsys.readouterr().err
  assert "no more capacity" in errors and "return code [255]" in errors
  verbs = cloud.verbs()
  assert verbs.count("create") == 3
  assert verbs.count("delete") == 2
  assert verbs[-1] == "delete" and not (cloud.folder / "state").exists()


@pytest.mark.parametrize(("verb", "earlier"), [("ssh", 0), ("scp", 0), ("ssh", 2)])
def test_watch_outlives_a_preemption_in_each_phase(cloud, verb, earlier):
  """While it stops, copies, starts."""
  (cloud.folder / "finish").touch()
  cloud.plan(**{verb: [None] * earlier + [{"state": "PREEMPTED"}]})
  assert launch("watch", *NEW, *FAST, "--poll-seconds=0.05", "--delete", *ON_DISK) == 0
  verbs = cloud.verbs()
  assert verbs.count("create") == 2 and verbs.count("delete") == 2
  assert verbs[-1] == "delete" and not (cloud.folder / "state").exists()


def test_watch_recreates_a_queued_resource_whose_nodes_are_gone(cloud):
  (cloud.folder / "finish").touch()
  cloud.plan(describe=[{"stdout": "ACTIVE"}, None, {"stdout": "ACTIVE"}, None])
  assert launch("watch", *NEW, "--queued", *FAST, "--poll-seconds=0.05", "--delete", *ON_DISK) == 0
  deletes = [call for call in cloud.calls() if call[3] == "delete"]
  assert len(deletes) == 2 and all("--force" in call for call in deletes)


def test_watch_stops_at_a_crash_of_training(cloud, capsys):
  (cloud.folder / "crash").touch()
  assert launch("watch", *NEW, *PATIENT, *ON_DISK) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert "training failed 7" in error and "costs" in error
  assert cloud.verbs().count("create") == 1


def test_watch_starts_a_run_that_hung_again(cloud):
  """The watchdog of `uae-jax train` ended it with its own exit code; the slice is kept."""
  assert HUNG_EXIT_CODE == watchdog.EXIT_CODE
  for file in ("hang", "finish"):
    (cloud.folder / file).touch()
  assert launch("watch", *NEW, *PATIENT, *ON_DISK) == 0
  assert cloud.verbs().count("create") == 1 and not (cloud.folder / "hang").exists()


def test_watch_gives_up_after_its_retries(cloud, capsys):
  cloud.plan(create=[{"exit": 1, "stderr": STOCK_OUT}] * 9)
  assert launch("watch", *NEW, *PATIENT, "--max-retries=2", *ON_DISK) == 1
  assert cloud.verbs().count("create") == 3
  assert "no more capacity" in capsys.readouterr().err.strip().splitlines()[-1]


def test_watch_gives_up_after_its_restarts(cloud, capsys):
  """The slice is preempted again and again."""
  cloud.plan(describe=[None, None, None] + [{"state": "PREEMPTED"}, None, None] * 9)
  assert launch("watch", *NEW, *FAST, "--poll-seconds=0", "--max-restarts=1", *ON_DISK) == 1
  assert cloud.verbs().count("create") == 2
  assert "gave up after 1 restarts" in capsys.readouterr().err


def test_resume_waits_for_a_queued_resource(cloud):
  queue = [{"stdout": "SUSPENDED"}, {"stdout": "WAITING_FOR_RESOURCES"}, {"stdout": "PROVISIONING"}]
  cloud.plan(describe=queue)
  (cloud.folder / "state").write_text("PREEMPTED")
  assert launch("resume", *NEW, "--queued", *FAST, "--poll-seconds=0", *ON_DISK) == 0
  first = [call[2:4] for call in cloud.calls()[:3]]
  assert first == [["queued-resources", verb] for verb in ("describe", "delete", "create")]
  assert "--force" in cloud.calls()[1]
  assert cloud.read("worker-1/uae_run/pid")


def test_delete_can_return_at_once(cloud):
  brought_up(cloud)
  assert launch("delete", "--async") == 0
  assert cloud.calls()[-1][2:5] == ["tpu-vm", "delete", "mine"] and "--async" in cloud.calls()[-1]


def test_batches_and_internal_addresses_reach_ssh_and_scp(cloud):
  assert launch("create", *NEW, "--internal-ip") == 0
  assert launch("setup", "--internal-ip", "--batch-size=64") == 0
  create, copy, ssh = cloud.calls()
  assert "--internal-ips" in create and create[0] == "compute"
  for call in (copy, ssh):
    assert call[0] == "alpha" and {"--worker=all", "--internal-ip", "--batch-size=64"} <= set(call)


@pytest.mark.parametrize(
  ("said", "advice"),
  [
    (STOCK_OUT, "no more capacity in the zone"),
    ("ERROR: (gcloud) Quota limit 'TPUV5sLitepod' has been exceeded. Limit: 0", "TPU quota is too small"),
    ("ERROR: (gcloud) You do not currently have an active account selected.", "gcloud auth login"),
    ("ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
    ("ERROR: (gcloud) Resource already exists", "choose another name"),
    ("ERROR: (gcloud) Cloud TPU API has not been used in project 1 before", "gcloud services enable tpu"),
    ("WARNING: your quota project differs\nERROR: (gcloud) Invalid value for [--zone]", "Invalid value for [--zone]"),
  ],
)
def test_an_error_names_the_step_and_carries_gclouds_own_words(cloud, capsys, said, advice):
  cloud.plan(create=[{"exit": 1, "stderr": said}])
  assert launch("create", *NEW) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("tpu_vm: error: create: ERROR: (gcloud")
  assert advice in error
  assert "quota" not in error or "Quota" in said


LOST = {"exit": 1, "stderr": "ERROR: (gcloud) UNAVAILABLE: connection reset"}


@pytest.mark.parametrize(
  ("answers", "code", "message"),
  [
    ({"create": [LOST | {"state": "CREATING"}]}, 0, "mine is CREATING and is billed when it is ready"),
    ({"create": [{"exit": 1, "stderr": "ERROR: odd", "state": "READY"}]}, 1, "mine is READY and is billed"),
    ({"create": [LOST], "describe": [LOST]}, 1, "mine may exist and be billed"),
    ({"create": [{"exit": 1, "stderr": STOCK_OUT}]}, 1, "the zone has none left: wait, use --queued"),
    ({"create": [{"exit": 1, "stderr": "ERROR: ALREADY_EXISTS", "state": "READY"}]}, 1, "or delete it first"),
  ],
)
def test_create_says_what_is_left_and_billed(cloud, capsys, answers, code, message):
  cloud.plan(**answers)
  assert launch("create", *NEW) == code
  assert message in capsys.readouterr().err.strip().splitlines()[-1]
  assert "delete" not in cloud.verbs()


def test_delete_outlives_a_lost_connection_and_else_says_what_may_exist(cloud, capsys):
  brought_up(cloud)
  cloud.plan(delete=[LOST, None])
  assert launch("delete", *FAST) == 0
  assert not (cloud.folder / "state").exists()
  # The first request was carried out, although its answer was lost.
  cloud.plan(delete=[LOST])
  assert launch("delete", *FAST) == 0
  cloud.plan(delete=[LOST] * 3, describe=[LOST])
  assert launch("delete", *FAST) == 1
  assert "mine may exist and be billed" in capsys.readouterr().err
  # A wrong name or zone is an error: the right ones are still there.
  assert launch("delete", *FAST) == 1
  assert "check name, zone and project" in capsys.readouterr().err


def test_create_retries_a_stock_out_if_asked(cloud):
  cloud.plan(create=[{"exit": 1, "stderr": STOCK_OUT}])
  assert launch("create", *NEW, *FAST, "--max-retries=1") == 0
  assert cloud.verbs() == ["create", "describe", "create"]


def test_without_gcloud_the_error_says_so(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert launch("delete") == 1
  assert "gcloud is not on PATH: install the Google Cloud CLI" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("command", "flags", "message"),
  [
    ("create", ["--accelerator-type=v5f-16"], "unknown slice 'v5f-16', did you mean v5p"),
    ("create", ["--accelerator-type=v5p-12"], "v5p does not come in this size, but in v5p:2x2x1, v5p:2x2x2"),
    ("create", [*NEW, "--valid-until-duration=6h"], "--valid-until-duration is for --queued"),
    ("start", [], "needs the flags of uae-jax train: --config=FILE --workdir=DIR"),
    ("start", [*TRAIN, "--dry-run"], "--dry-run belongs before --"),
    ("start", ["--env=2=NOTE", *TRAIN], "--env: expected NAME=VALUE"),
    ("stop", TRAIN, "stop takes nothing after --"),
    ("create", ["--topology=tpu7x:4x4x4"], "GKE has it: python -m launch.jobset"),
    ("create", ["--topology=v6e:4x4", "--flex-start"], "--flex-start needs --max-run-duration"),
    ("create", [*NEW, "--max-retries=-1"], "'-1': expected a whole number from 0"),
    ("watch", [*NEW, "--poll-seconds=nan", *TRAIN], "'nan': expected seconds, such as 30 or 0.5"),
    ("setup", ["--ref=--output=x"], "'--output=x': expected a branch, tag or commit"),
    ("setup", ["--repository=--upload-pack=x"], "expected the URL of a repository"),
    ("setup", ["--bucket=--key-file=x"], "expected the name of a bucket"),
    ("setup", ["--bucket=gs://b"], "without gs://"),
    ("tail", ["--worker=0;id"], "expected a number or all"),
    ("start", ["--secret=A=k8s:b/c", *TRAIN], "is for launch.jobset"),
    ("watch", [*NEW, *TRAIN], "no bucket is mounted there"),
    ("status", ["--zone=us-west4"], "'us-west4': expected a zone such as us-west4-a"),
  ],
)
def test_wrong_options_are_one_line(cloud, capsys, command, flags, message):
  with pytest.raises(SystemExit, match="2"):
    launch(command, *flags)
  error = capsys.readouterr().err.strip()
  assert message in error and "\n" not in error
  assert cloud.calls() == []


@pytest.mark.parametrize("name", ["mine;id", "Mine", "a b", "$(id)", "9a", "a-", "a" * 64, "--rm"])
def test_a_name_follows_googles_rule(cloud, name):
  with pytest.raises(SystemExit, match="2"):
    tpu_vm.main(["create", *NEW, *PLACE, name])
  assert cloud.calls() == []

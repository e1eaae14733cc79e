"""Sweeps run, resume, halve and launch their points, and write one page. Training itself is replaced by a stand-in."""

import fcntl
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from uae_jax import cli
from uae_jax.sweeps import runner

STAGE = "generation_for_understanding"
FLAGS = [
  "--config=configs/scenes.py:smoke",
  f"--config.stages={STAGE}",
  "--config.init.checkpoint=base:cold_start",
  f"--config.{STAGE}.total_steps=10",
]
RATES, TEMPERATURES = (
  f"--grid=config.{STAGE}.optimizer.learning_rate=1e-3,1e-2",
  f"--grid=config.{STAGE}.options.temperature",
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
  monkeypatch.setattr(runner, "TRAIN", (sys.executable, "-m", "tests.end_to_end.fake_train"))
  monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def sweep(folder: Path, *flags: str) -> int:
  return cli.main(["sweep", f"--workdir={folder}", *FLAGS, *flags])


def states(folder: Path) -> dict[str, str]:
  return {run["name"]: run["state"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}


def test_a_sweep_runs_fails_retries_and_shows_the_best(tmp_path, capsys):
  assert sweep(tmp_path, RATES, f"{TEMPERATURES}=1.0,2.0", "--parallel=2") == 1
  assert states(tmp_path) == {
    "learning_rate-1e-2_temperature-1.0": "finished",
    "learning_rate-1e-3_temperature-1.0": "finished",
    "learning_rate-1e-3_temperature-2.0": "failed",
    "learning_rate-1e-2_temperature-2.0": "failed",
  }
  out = capsys.readouterr().out
  best = f"uae-jax train {FLAGS[0]} --workdir={tmp_path}/learning_rate-1e-2_temperature-1.0_again"
  assert "best reward_similarity: learning_rate-1e-2_temperature-1.0" in out and best in out
  page = (tmp_path / "index.html").read_text()
  assert "2 finished, 2 failed" in page and page.count("<svg") == 2 and "<script" not in page
  assert "the loss of learning_rate-1e-2_temperature-2.0 is not finite (exit code 1)" in page

  metrics = tmp_path / "learning_rate-1e-2_temperature-1.0" / "metrics.jsonl"
  before = metrics.stat().st_mtime_ns
  log = tmp_path / "logs" / "learning_rate-1e-2_temperature-2.0.log"
  for flags, attempts in ([], 1), (["--retry-failed"], 2):
    assert sweep(tmp_path, RATES, f"{TEMPERATURES}=1.0,2.0", *flags) == 1
    assert log.read_text().count("is not finite") == attempts
  assert metrics.stat().st_mtime_ns == before
  assert "failed before: the loss of learning_rate-1e-2_temperature-2.0" in capsys.readouterr().err

  # A lower metric may be the better one; the points that remain may be chosen.
  assert sweep(tmp_path, RATES, f"{TEMPERATURES}=1.0", "--goal=min", "--list") == 0
  assert "best reward_similarity: learning_rate-1e-3" in capsys.readouterr().out


def test_finished_runs_of_another_config_are_not_taken_for_results(tmp_path, capsys):
  assert sweep(tmp_path, f"{TEMPERATURES}=1.0") == 0
  assert sweep(tmp_path, f"{TEMPERATURES}=1.0", "--config.seed=3") == 1
  assert "holds a run with another config (config.seed: 0 -> 3)" in capsys.readouterr().err


def test_halving_stops_the_worse_runs_at_the_fraction(tmp_path):
  flags = (
    f"{TEMPERATURES}=0.1,0.2,0.3,0.4",
    "--halving=0.5",
    "--halving-metric=reward",
    f"--config.{STAGE}.total_steps=40",
  )
  assert sweep(tmp_path, *flags) == 0
  assert sorted(states(tmp_path).values()) == ["finished", "finished", "started", "started"]
  lengths = {name: len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) for name in states(tmp_path)}
  assert lengths["temperature-0.4"] == lengths["temperature-0.3"] == 40
  assert all(20 <= lengths[name] < 40 for name in ("temperature-0.1", "temperature-0.2"))
  assert sweep(tmp_path, *flags) == 0  # and nothing runs again
  assert lengths == {name: len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) for name in lengths}


def test_halving_needs_a_logged_metric(tmp_path, capsys):
  assert sweep(tmp_path, f"{TEMPERATURES}=1.0", "--halving=0.5", "--metric=psnr") == 1
  assert "--halving: no run logged 'psnr' at 50% of its last stage" in capsys.readouterr().err


def test_a_launcher_gets_a_command_per_run_once(tmp_path, capsys):
  record = tmp_path / "record.py"
  record.write_text("import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '\\n')")
  template = f"{sys.executable} {record} {tmp_path / 'jobs'} {{name}} -- {{flags}}"
  flags = (f"{TEMPERATURES}=0.5,1.0", f"--launcher={template}", "--name=mine")
  assert sweep(tmp_path / "sweep", *flags) == 0
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == 2 and not (tmp_path / "jobs").exists()
  for _ in range(2):
    assert sweep(tmp_path / "sweep", *flags, "--submit") == 0
  jobs = (tmp_path / "jobs").read_text().splitlines()
  assert len(jobs) == 2 and jobs[0].startswith("mine-temperature-0-5-")
  assert f"-- {FLAGS[0]} --workdir={tmp_path}/sweep/temperature-0.5 " in jobs[0]


def test_an_interrupted_sweep_saves_and_goes_on(tmp_path):
  flags = [
    f"--workdir={tmp_path}",
    *FLAGS,
    f"{TEMPERATURES}=0.5,1.0",
    "--parallel=2",
    f"--config.{STAGE}.total_steps=100",
  ]
  code = (
    "from tests.end_to_end import test_sweep; import sys; from uae_jax.sweeps import runner; from uae_jax import cli; "
  )
  code += "runner.TRAIN = (sys.executable, '-m', 'tests.end_to_end.fake_train'); sys.exit(cli.main(sys.argv[1:]))"
  process = subprocess.Popen([sys.executable, "-c", code, "sweep", *flags], stderr=subprocess.PIPE, text=True)
  while process.poll() is None and len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate()
  assert process.returncode == 130 and "interrupted" in errors
  assert set(states(tmp_path).values()) == {"started"}
  assert cli.main(["sweep", *flags]) == 0
  assert set(states(tmp_path).values()) == {"finished"}


# A run that takes 5 s to save.
SLOW = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(5), os._exit(0)))
pathlib.Path(sys.argv[2].partition("=")[2] + ".ready").touch()
time.sleep(60)
"""


def test_a_second_ctrl_c_ends_a_sweep_while_its_runs_save(tmp_path):
  code = (
    "import sys; from uae_jax import cli; from uae_jax.sweeps import runner; "
    f"runner.TRAIN = (sys.executable, '-c', {SLOW!r}); sys.exit(cli.main())"
  )
  flags = [f"--workdir={tmp_path}", *FLAGS, f"{TEMPERATURES}=0.5"]
  process = subprocess.Popen([sys.executable, "-c", code, "sweep", *flags], stderr=subprocess.PIPE, text=True)
  while process.poll() is None and not list(tmp_path.glob("*.ready")):
    time.sleep(0.02)
  process.send_signal(signal.SIGINT)
  time.sleep(0.5)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  begin = time.monotonic()
  _, errors = process.communicate()
  assert process.returncode == 130 and time.monotonic() - begin < 4
  assert errors.splitlines()[-1] == "uae-jax sweep: interrupted, its runs save and end by themselves"


def test_runs_are_asked_to_save_at_the_same_time(tmp_path):
  """The first one ends only when the second one was asked too."""
  wait = "import time, os\nfor _ in range(1500):\n  time.sleep(0.02)\n"
  wait += f"  if os.path.exists('{tmp_path}/asked'): os._exit(0)\nos._exit(1)"
  note = f"open('{tmp_path}/asked', 'w').close(); import os; os._exit(0)"
  processes = []
  for i, act in enumerate((wait, note)):
    code = f"import signal, time\nsignal.signal(15, lambda *_: exec({act!r}))\n"
    code += f"open('{tmp_path}/{i}', 'w').close()\ntime.sleep(60)"
    processes.append(subprocess.Popen([sys.executable, "-IS", "-c", code]))
  while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
    time.sleep(0.02)
  runner.stop(processes)
  assert [process.returncode for process in processes] == [0, 0]


def test_a_run_of_a_killed_sweep_is_waited_for(tmp_path):
  """Its process still holds its log; a second one on the same workdir would damage it."""
  (tmp_path / "logs").mkdir()
  with (tmp_path / "logs" / "temperature-1.0.log").open("ab") as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], stdout=log)
  start = time.monotonic()
  assert sweep(tmp_path, f"{TEMPERATURES}=1.0") == 0
  assert holder.poll() is not None and time.monotonic() - start > 1


def test_processes_share_the_machine(monkeypatch):
  monkeypatch.setattr(runner, "visible_gpus", lambda: [])
  cores = [runner.share(slot, 2)[1] for slot in range(2)]
  assert cores[0] and cores[1] and (os.cpu_count() == 1 or not cores[0] & cores[1])
  monkeypatch.setattr(runner, "visible_gpus", lambda: ["0", "1", "2", "5"])
  assert [runner.share(slot, 2)[0] for slot in range(2)] == [
    {"CUDA_VISIBLE_DEVICES": "0,2"},
    {"CUDA_VISIBLE_DEVICES": "1,5"},
  ]
  with pytest.raises(ValueError, match="--parallel=8: there are 4 GPUs"):
    runner.share(0, 8)

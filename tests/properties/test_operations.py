"""Compiler flags, status, watchdog and metric writers of a run."""

import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import time
import types

import pytest

from uae_jax import cli
from uae_jax.commands import compiler_flags
from uae_jax.options import Experiment
from uae_jax.report.progress import read_progress, record_start
from uae_jax.training import watchdog
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.workdir import open_workdir

pytestmark = pytest.mark.fast

STAGE = "pretrain"
CONFIG = Experiment(stages=(STAGE,))
TOTAL = CONFIG.pretrain.total_steps


@pytest.mark.parametrize(
  "flag", ["--xla_tpu_enable_latency_hiding_scheduler=true", "--xla_enable_async_all_gather=true"]
)
def test_flags_of_libtpu_are_sent_to_their_own_field(flag, monkeypatch):
  with pytest.raises(ValueError, match=f"xla_flags: {flag} is a flag of libtpu.*put it into libtpu_init_args"):
    Experiment(xla_flags=f"--xla_dump_to=x {flag}")
  monkeypatch.setenv("XLA_FLAGS", flag)
  with pytest.raises(ValueError, match=f"the environment's XLA_FLAGS: {flag} .* put it into LIBTPU_INIT_ARGS"):
    compiler_flags.add(CONFIG)


@pytest.mark.parametrize("name", ["xla_flags", "libtpu_init_args"])
def test_a_word_that_is_no_flag_is_refused(name):
  with pytest.raises(ValueError, match=f"{name}: 'junk' is not a flag: expected --NAME=VALUE"):
    Experiment(**{name: "--xla_a=1 junk"})


def test_flags_reach_the_environment_which_wins(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_b=2")
  monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
  compiler_flags.add(CONFIG)
  assert compiler_flags.in_effect() == {"XLA_FLAGS": "--xla_b=2"}
  compiler_flags.add(Experiment(xla_flags="--xla_b=1 --xla_tpu_detect_nan=true", libtpu_init_args="--xla_tpu_a=1"))
  assert compiler_flags.in_effect() == {
    "XLA_FLAGS": "--xla_b=1 --xla_tpu_detect_nan=true --xla_b=2",
    "LIBTPU_INIT_ARGS": "--xla_tpu_a=1",
  }


def write_run(workdir: Path, steps: int) -> None:
  """A run of 2 s per step that was started twice, 100 s before its last line."""
  open_workdir(workdir, CONFIG)
  now = time.time()
  record_start(workdir, now - 100.0, num_processes=1)
  record_start(workdir, now - 60.0, num_processes=1)
  writer = MetricWriter(workdir, tensorboard=False)
  writer.start_stage(STAGE, step=0, total_steps=TOTAL)
  for step in range(5, steps + 1, 5):
    writer.write(STAGE, step, {"loss": 1.0, "seconds_step": 2.0})
  writer.write(STAGE, steps, {"caption_recall": 0.5})
  writer.close()


def test_status_of_a_run_on_its_way(tmp_path, capsys):
  write_run(tmp_path / "run", 20)
  (tmp_path / "run" / "checkpoints" / STAGE / "15").mkdir(parents=True)
  (tmp_path / "run" / "checkpoints" / STAGE / "20.orbax-checkpoint-tmp").mkdir()
  run = read_progress(tmp_path / "run", now=time.time() + 30)
  assert (run.state, run.stage, run.step, run.total_steps, run.last_save) == ("training", STAGE, 20, TOTAL, 15)
  assert run.restarts == 1 and run.steps_per_second == 0.5 and run.eta_seconds == 2 * (TOTAL - 20)
  assert run.goodput == pytest.approx(20 * 2.0 / 100.0, rel=0.05) and run.idle_seconds == pytest.approx(30, abs=5)
  assert cli.main(["status", str(tmp_path)]) == 0
  assert f"{STAGE}  20/{TOTAL}" in capsys.readouterr().out
  assert cli.main(["status", "--json", str(tmp_path / "run")]) == 0
  assert json.loads(capsys.readouterr().out)[0]["step"] == 20


def test_status_tells_stages_of_life_apart(tmp_path):
  open_workdir(tmp_path, CONFIG)
  assert read_progress(tmp_path).state == "new"
  write_run(tmp_path, 20)
  (tmp_path / "checkpoints" / STAGE / "20" / "params").mkdir(parents=True)
  assert read_progress(tmp_path).state == "evaluating"
  (tmp_path / "evaluation").mkdir()
  (tmp_path / "evaluation" / f"{STAGE}.json").write_text("{}")
  assert read_progress(tmp_path).state == "finished"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path, capsys):
  write_run(tmp_path / "run", 20)
  capsys.readouterr()  # a progress bar
  (tmp_path / "torn").mkdir()
  (tmp_path / "torn" / "config.json").write_text('{"seed": ')
  assert cli.main(["status", str(tmp_path)]) == 1
  shown = capsys.readouterr()
  assert f"{STAGE}  20/{TOTAL}" in shown.out
  assert "torn/config.json: not JSON" in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
  "line",
  [
    {"stage": "no_stage", "step": 25},
    {"stage": STAGE, "step": 20, "seconds_step": "long", "useful_seconds": [1]},
    {"stage": STAGE, "step": 20, "seconds_step": -1, "useful_seconds": None},
  ],
)
def test_a_damaged_line_does_not_hide_the_status_of_a_run(tmp_path, line):
  write_run(tmp_path, 20)
  with (tmp_path / "metrics.jsonl").open("a") as metrics:
    metrics.write(json.dumps(line) + "\n")
  run = read_progress(tmp_path)
  assert (run.stage, run.step, run.steps_per_second) == (STAGE, 20, 0.5)


def test_status_of_no_run_is_one_line(tmp_path, capsys):
  assert cli.main(["status", str(tmp_path)]) == 2
  assert "neither the workdir of a run nor a folder of workdirs" in capsys.readouterr().err


def test_status_reads_the_end_of_a_long_file(tmp_path):
  write_run(tmp_path, 20)
  metrics = tmp_path / "metrics.jsonl"
  lines = metrics.read_bytes()
  with metrics.open("wb") as out:
    out.truncate(2**36)  # a sparse file that nobody could read in time
    out.seek(0, os.SEEK_END)
    out.write(b"\n" + lines + b'{"stage": "pre')
  begin = time.monotonic()
  assert read_progress(tmp_path).step == 20 and time.monotonic() - begin < 2.0


def test_useful_seconds_go_on_after_a_restart_without_lost_steps(tmp_path):
  write_run(tmp_path, 20)
  writer = MetricWriter(tmp_path, tensorboard=False)
  writer.start_stage(STAGE, step=15, total_steps=TOTAL)
  writer.write(STAGE, 20, {"seconds_step": 3.0})
  writer.close()
  last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  assert last["useful_seconds"] == 15 * 2.0 + 5 * 3.0


def hang(tmp_path: Path, code: str) -> subprocess.CompletedProcess:
  """Runs code with a watchdog of 0.5 s, in process 3 of a run."""
  program = "import time\nfrom uae_jax.training import watchdog\nwatchdog.GRACE = 4\nfrom pathlib import Path\n"
  program += f"with watchdog.Watchdog(0.5, Path({str(tmp_path)!r}), 3) as dog:\n  {code}"
  return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


def test_the_watchdog_ends_a_process_whose_steps_have_stopped(tmp_path):
  done = hang(tmp_path, "dog.beat(); time.sleep(50)")
  assert done.returncode == watchdog.EXIT_CODE == 175
  assert "process 3 hangs" in done.stderr and "Thread" in done.stderr
  (file,) = (tmp_path / "hangs").iterdir()
  assert file.name.endswith("_process_3.txt") and "<string>" in file.read_text()


def test_the_watchdog_is_patient_with_what_is_no_step(tmp_path):
  """Compiling, evaluation and saves take longer than a step; heartbeats and the end of the run silence it."""
  code = "time.sleep(1.2); dog.beat(); time.sleep(0.3); dog.grace(); time.sleep(1.2); dog.beat()\ntime.sleep(1.0)"
  done = hang(tmp_path, code)
  assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "hangs").exists()


def test_grace_ends(tmp_path):
  assert hang(tmp_path, "time.sleep(50)").returncode == watchdog.EXIT_CODE


class Recorder:
  """A writer of metrics that keeps what it gets."""

  def __init__(self, workdir, config):
    self.workdir, self.config, self.calls = workdir, config, []

  def __getattr__(self, name):
    return lambda *arguments, **options: self.calls.append((name, *arguments, *options.values()))


def test_metrics_go_to_any_writer(tmp_path, monkeypatch):
  made = []
  module = types.SimpleNamespace(make=lambda *arguments: made.append(Recorder(*arguments)) or made[-1])
  monkeypatch.setitem(sys.modules, "my_writers", module)
  writer = MetricWriter(tmp_path, tensorboard=False, others=("my_writers:make",), config={"seed": 1})
  writer.start_stage(STAGE, step=0, total_steps=3)
  writer.write(STAGE, 1, {"loss": 2.0})
  writer.close()
  (recorder,) = made
  assert recorder.workdir == tmp_path and recorder.config == {"seed": 1}
  assert recorder.calls[0][:2] == ("write_scalars", 1) and recorder.calls[0][2]["pretrain/loss"] == 2.0
  assert recorder.calls[-1] == ("close",)


def test_wandb_gets_a_step_axis_per_stage(tmp_path, monkeypatch):
  run = Recorder(None, None)
  started = []
  monkeypatch.setitem(
    sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: started.append(options) or run)
  )
  for _ in range(2):
    writer = MetricWriter(tmp_path, tensorboard=False, others=("wandb",), config={"seed": 1})
    writer.write(STAGE, 1, {"loss": 2.0})
    writer.close()
  assert started[0] == started[1] and started[0]["resume"] == "allow" and started[0]["config"] == {"seed": 1}
  defined, logged = run.calls[:2]
  assert defined == ("define_metric", "pretrain/*", "pretrain/step")
  assert logged[1]["pretrain/step"] == 1 and logged[1]["pretrain/loss"] == 2.0


def test_a_writer_that_does_not_exist_is_one_line(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="metric_writers: 'tensorflow' is neither wandb nor MODULE:FUNCTION"):
    dataclasses.replace(CONFIG, metric_writers=("tensorflow",))
  with pytest.raises(ValueError, match="config.metric_writers names 'no_module:make', which cannot be imported"):
    MetricWriter(tmp_path, tensorboard=False, others=("no_module:make",))
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match=r"pip install 'uae_jax\[wandb\]'"):
    MetricWriter(tmp_path, tensorboard=False, others=("wandb",))

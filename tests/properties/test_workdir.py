"""The folder of a run: which changes of a config a resume accepts, records or refuses; damaged files; the lock."""

import json
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest
from synthetic_workdir import metric_lines

from uae_jax.options import STAGES, Experiment, new_config, read_config
from uae_jax.report.page import write_report
from uae_jax.training import lock as lock_lib
from uae_jax.training.lock import WorkdirLock
from uae_jax.training.workdir import FREE_FIELDS, MOVABLE_PATHS, check_workdir, differences, open_workdir, to_plain


def config(**changes) -> Experiment:
  made = new_config()
  made.embedders.update(clip="fresh", dinov2="fresh")
  for field, value in changes.items():
    *parents, name = field.split("__")
    section = made
    for parent in parents:
      section = section[parent]
    section[name] = value
  return read_config(made)


def save_step(workdir: Path, folder: str, step: int, content: dict | None = None) -> None:
  item = workdir / "checkpoints" / folder / str(step) / "config"
  item.mkdir(parents=True)
  (item / "metadata").write_text(json.dumps(content or {}))


@pytest.fixture
def workdir(tmp_path) -> Path:
  """A run with step 40 of pretrain and step 10 of cold_start."""
  open_workdir(tmp_path / "run", config())
  save_step(tmp_path / "run", "pretrain", 40)
  save_step(tmp_path / "run", "cold_start", 10)
  return tmp_path / "run"


def read(workdir: Path) -> dict:
  return json.loads((workdir / "config.json").read_text())


def test_without_a_saved_step_any_change_is_accepted(tmp_path):
  open_workdir(tmp_path, config(seed=1))
  (tmp_path / "processor").mkdir()
  (tmp_path / "model.json").write_text("of another model")
  (tmp_path / "metrics.jsonl").write_text("of another seed")
  open_workdir(tmp_path, config(seed=2))
  assert read(tmp_path)["seed"] == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


@pytest.mark.parametrize(
  "field, value",
  [
    ("pretrain__optimizer__learning_rate", 5e-5),
    ("max_skipped_in_a_row", 50),
    ("pretrain__save_every_steps", 7),
    ("pretrain__total_steps", 400),
    ("mesh__fsdp", 2),
    ("evaluation__batch_size", 4),
    # Stage 2 has not begun.
    ("generation_for_understanding__options__temperature", 0.5),
  ],
)
def test_what_may_change_is_recorded_with_its_step(workdir, field, value):
  open_workdir(workdir, config(**{field: value}))
  (line,) = (workdir / "config_changes.jsonl").read_text().splitlines()
  record = json.loads(line)
  assert (record["stage"], record["step"]) == ("cold_start", 10)
  assert {name: new for name, (_, new) in record["changes"].items()} == {field.replace("__", "."): value}
  section = read(workdir)
  for part in field.split("__"):
    section = section[part]
  assert section == value
  # The same command again is no further change.
  open_workdir(workdir, config(**{field: value}))
  assert len((workdir / "config_changes.jsonl").read_text().splitlines()) == 1


def test_the_report_shows_what_changed(workdir):
  open_workdir(workdir, config(pretrain__optimizer__learning_rate=5e-5))
  with (workdir / "config_changes.jsonl").open("ab") as file:
    file.write(b'{"stage": "pre\xff\n')
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()[:20]))
  html = write_report(workdir).read_text()
  assert "pretrain.optimizer.learning_rate, from step 10 of cold_start" in html
  assert "0.0001 → 5e-05" in html
  assert "a line of config_changes.jsonl could not be read" in html


@pytest.mark.parametrize(
  "changes, named",
  [
    ({"seed": 1}, "config.seed: 0 -&gt; 1"),
    ({"pretrain__batch_size": 8}, "config.pretrain.batch_size: 32 -> 8"),
    ({"pretrain__optimizer__schedule": "constant", "pretrain__optimizer__end_factor": 0.05}, "schedule: 'cosine'"),
    ({"data__image_px": 32}, "config.data.image_px"),
    ({"embedders__clip": "/weights/clip"}, "config.embedders.clip: 'fresh' -> '/weights/clip'"),
  ],
)
def test_what_would_make_another_run_is_refused_by_name(workdir, changes, named):
  before = read(workdir)
  with pytest.raises(ValueError) as caught:
    check_workdir(workdir, config(**changes))
  assert named.replace("&gt;", ">") in str(caught.value) and "\n" not in str(caught.value)
  with pytest.raises(ValueError):
    open_workdir(workdir, config(**changes))
  assert read(workdir) == before and not (workdir / "config_changes.jsonl").exists()


def test_paths_may_move(tmp_path):
  old = {"embedders__clip": "/old/clip", "data__source": "jsonl:/old/train.jsonl", "init__weights": "/old/uae"}
  new = {"embedders__clip": "/new/clip", "data__source": "jsonl:/new/train.jsonl", "init__weights": "/new/uae"}
  open_workdir(tmp_path, config(**old))
  save_step(tmp_path, "pretrain", 40)
  assert len(check_workdir(tmp_path, config(**new))) == 3
  for field, value in (("data__source", "scenes"), ("init__weights", "")):
    with pytest.raises(ValueError, match=f"config.{field.replace('__', '.')}"):
      check_workdir(tmp_path, config(**{**new, field: value}))


def test_a_stage_cannot_become_shorter_than_it_is(workdir):
  with pytest.raises(ValueError, match=r"config\.pretrain\.total_steps = 30, but .* holds step 40 of pretrain"):
    check_workdir(workdir, config(pretrain__total_steps=30))


def test_every_pattern_of_free_fields_has_a_field():
  from fnmatch import fnmatchcase

  plain = differences({}, to_plain(config(embedders__clip="x")))
  flat: list[str] = []

  def walk(tree, prefix):
    for name, value in tree.items():
      walk(value, f"{prefix}{name}.") if isinstance(value, dict) else flat.append(prefix + name)

  walk(to_plain(config()), "")
  assert plain
  for pattern in FREE_FIELDS + MOVABLE_PATHS:
    assert any(fnmatchcase(field, pattern) for field in flat), pattern
  documented = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
  for pattern in FREE_FIELDS + MOVABLE_PATHS:
    assert f"`{pattern.replace('*.', '<stage>.') if pattern.startswith('*') else pattern}`" in documented, pattern


@pytest.mark.parametrize("content", [b"", b'{"config_version": 2, "se', b"\xff\xfe", b"[1, 2]", b"[" * 100_000])
def test_a_damaged_config_is_taken_from_the_newest_step(workdir, content):
  plain = to_plain(config())
  save_step(workdir, "cold_start", 20, plain)
  (workdir / "config.json").write_bytes(content)
  assert check_workdir(workdir, config()) == {}
  open_workdir(workdir, config())
  assert read(workdir) == plain
  (workdir / "config.json").write_bytes(content)
  with pytest.raises(ValueError, match="config.seed: 0 -> 1"):
    check_workdir(workdir, config(seed=1))


def test_a_damaged_config_without_a_saved_step_is_written_again(tmp_path):
  (tmp_path / "config.json").write_bytes(b"{")
  open_workdir(tmp_path, config())
  assert read(tmp_path) == to_plain(config())


def test_a_field_that_a_config_does_not_have_yet_has_its_default(workdir):
  plain = read(workdir)
  del plain["lora"], plain["pretrain"]["ema_decay"]
  (workdir / "config.json").write_text(json.dumps(plain))
  assert check_workdir(workdir, config()) == {}
  with pytest.raises(ValueError, match="ema_decay"):
    check_workdir(workdir, config(pretrain__ema_decay=0.9))


def test_folders_and_files_of_others_are_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file: expected a folder"):
    check_workdir(tmp_path / "file", config())
  with pytest.raises(ValueError, match="is not empty and holds no config.json"):
    check_workdir(tmp_path, config())
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_stages_of_rounds_have_begun_together(tmp_path):
  open_workdir(tmp_path, config(rounds=2))
  save_step(tmp_path, "generation_for_understanding_round1", 5)
  with pytest.raises(ValueError, match="generation_for_understanding.options.temperature"):
    check_workdir(tmp_path, config(rounds=2, generation_for_understanding__options__temperature=0.5))
  assert check_workdir(tmp_path, config(rounds=2, understanding_for_generation__options__temperature=0.5))
  assert set(STAGES) >= {"generation_for_understanding"}


# --- The lock ---------------------------------------------------------------------------------------------------------


def hold(workdir: str, ready) -> None:
  with WorkdirLock(Path(workdir)):
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
  """A live process that holds the lock of `tmp_path`."""
  context = multiprocessing.get_context("spawn")
  ready = context.Event()
  process = context.Process(target=hold, args=(str(tmp_path), ready))
  process.start()
  assert ready.wait(60)
  yield process
  process.kill()
  process.join()


def test_a_second_process_is_refused_and_a_killed_one_makes_room(tmp_path, holder):
  link = tmp_path.with_name("link")
  link.symlink_to(tmp_path)
  for path in (tmp_path, link):
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on .*end that run first"):
      WorkdirLock(path).__enter__()
  os.kill(holder.pid, signal.SIGKILL)
  holder.join()
  with WorkdirLock(tmp_path) as lock:
    assert lock.is_held()
  assert list(tmp_path.iterdir()) == []


def held_elsewhere(workdir: Path, **fields) -> dict:
  held = {"host": "other", "pid": 7, "place": "other boot", "start": "1", "token": "t"} | fields
  (workdir / "lock.json").write_text(json.dumps(held))
  return held


def test_a_lock_of_another_machine_is_taken_once_its_heartbeat_stands_still(tmp_path, monkeypatch):
  monkeypatch.setattr(lock_lib, "PATIENCE_SECONDS", 0.5)
  held_elsewhere(tmp_path)
  begin = time.monotonic()
  with WorkdirLock(tmp_path) as lock:
    assert time.monotonic() - begin >= 0.5
    assert lock.is_held()


def test_a_lock_of_another_machine_that_beats_is_respected(tmp_path, monkeypatch):
  held_elsewhere(tmp_path)
  monkeypatch.setattr(lock_lib.time, "sleep", lambda _: (tmp_path / "lock.json").touch())
  with pytest.raises(ValueError, match="in use by process 7 on other"):
    WorkdirLock(tmp_path).__enter__()


def test_a_reused_process_id_is_not_the_holder(tmp_path):
  held_elsewhere(tmp_path, place=lock_lib.this_place(), pid=os.getpid(), start="1")
  with WorkdirLock(tmp_path) as lock:
    assert lock.is_held()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_a_damaged_lock_is_taken(tmp_path, monkeypatch, content):
  monkeypatch.setattr(lock_lib, "PATIENCE_SECONDS", 0.1)
  (tmp_path / "lock.json").write_bytes(content)
  with WorkdirLock(tmp_path) as lock:
    assert lock.is_held()


def test_who_lost_the_lock_while_suspended_saves_nothing_more(tmp_path, monkeypatch):
  monkeypatch.setattr(lock_lib, "HEARTBEAT_SECONDS", 0.05)
  with WorkdirLock(tmp_path) as lock:
    lock.check()
    made = (tmp_path / "lock.json").stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / "lock.json").stat().st_mtime_ns > made
    held = held_elsewhere(tmp_path)
    with pytest.raises(ValueError, match="taken over by process 7 on other: this process saves nothing more"):
      lock.check()
    time.sleep(0.2)
  # The lock of the other one stays.
  assert json.loads((tmp_path / "lock.json").read_text()) == held


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, sys, time
from pathlib import Path
from uae_jax import cli, sharding
from uae_jax.training.preemption import PreemptionNotice

def main(argv):
  with PreemptionNotice(sharding.make_mesh()) as notice:
    Path(argv[0]).touch()
    for _ in range(600):
      {work}
      if notice():
        raise KeyboardInterrupt("saved at step 1: the same command resumes")

import types
sys.modules["toy"] = types.SimpleNamespace(main=main)
cli.COMMANDS["toy"] = ("toy", "")
sys.argv = ["uae-jax", "toy", sys.argv[1]]
sys.exit(cli.main())
"""
# A call that does not return to the interpreter, as a compilation.
BUSY = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"


def interrupt(tmp_path, work: str, count: int) -> tuple[int, str]:
  """Sends Ctrl-C `count` times to a command that works; returns (exit code, stderr)."""
  started = tmp_path / "started"
  code = INTERRUPTED.replace("{work}", work)
  process = subprocess.Popen([sys.executable, "-c", code, str(started)], stderr=subprocess.PIPE, text=True)
  while not started.exists():
    assert process.poll() is None
    time.sleep(0.1)
  for _ in range(count):
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=120)
  return process.returncode, stderr


def test_ctrl_c_ends_after_the_step_with_130(tmp_path):
  code, stderr = interrupt(tmp_path, "time.sleep(0.1)", 1)
  assert code == 130
  first, last = [line for line in stderr.splitlines() if line]
  assert first == "interrupted: the run saves and ends after this step; Ctrl-C again ends it at once"
  assert last == "uae-jax toy: interrupted, saved at step 1: the same command resumes"


def test_a_second_ctrl_c_ends_at_once_even_outside_of_the_interpreter(tmp_path):
  begin = time.monotonic()
  code, stderr = interrupt(tmp_path, BUSY, 2)
  assert code == 130 and "Traceback" not in stderr
  assert stderr.splitlines()[-1] == "ended without saving"
  assert time.monotonic() - begin < 90

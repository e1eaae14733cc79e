"""Sweeps and servers that receive signals at random times end as documented, and the same command goes on.

The processes are forked from a server that has imported everything, so that most signals come while they work.
"""

from collections.abc import Callable
import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
import random
import re
import signal
import sys
import threading
import time
import urllib.request

import pytest

from uae_jax import cli

pytestmark = pytest.mark.slow

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
WAYS = ((TERM,), (INT,), (KILL,), (INT, INT), (TERM, TERM), (TERM, INT), (INT, TERM))
SWEPT = "generation_for_understanding"
SWEEP = (
  *("sweep", "--config=configs/scenes.py:smoke", f"--config.stages={SWEPT}", "--parallel=2"),
  *("--config.init.checkpoint=base:cold_start", f"--config.{SWEPT}.total_steps=150"),
  f"--grid=config.{SWEPT}.options.temperature=0.5,1.0",
)
# Imported once by the server from which all processes are forked.
PRELOAD = (
  "tests.end_to_end.test_signals",
  "tests.properties.test_serve",
  "uae_jax.commands.serve",
  "uae_jax.sweeps.runner",
)


def sweep(folder: Path) -> None:
  """A sweep whose runs write files without training."""
  from uae_jax.sweeps import runner

  runner.TRAIN, runner.POLL_SECONDS = (sys.executable, "-m", "tests.end_to_end.fake_train"), 0.02
  command(folder, (*SWEEP, f"--workdir={folder / 'sweep'}"))


def serve(folder: Path) -> None:
  """A server whose model is a stand-in that takes a while."""
  from tests.properties import test_serve
  from uae_jax.commands import model_arguments

  model = test_serve.StandIn()
  model._called = lambda *_: time.sleep(0.05)
  model_arguments.load = lambda _: time.sleep(0.2) or model
  command(folder, ("serve", "--model=m", "--port=0"))


def command(folder: Path, argv: tuple[str, ...]) -> None:
  """Runs a command as a process does, with its output in files; touches `began` first."""
  for stream, name in ((1, "out"), (2, "errors")):
    os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
  # A shell starts what it runs in the background with Ctrl-C ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  sys.argv = ["uae-jax", *argv]
  (folder / "began").touch()
  sys.exit(cli.main())


@dataclasses.dataclass(frozen=True)
class Command:
  """A command in a folder, started again and again.

  Attributes:
    run: runs it; importable.
    folder: its files.
  """

  run: Callable[[Path], None]
  folder: Path

  def start(self):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    (self.folder / "began").unlink(missing_ok=True)
    process = context.Process(target=self.run, args=(self.folder,))
    process.start()
    while not (self.folder / "began").exists():
      time.sleep(0.005)
    return process

  def finish(self) -> float:
    """Lets it end; returns its seconds."""
    begin, process = time.monotonic(), self.start()
    process.join()
    assert process.exitcode == 0, (self.folder / "errors").read_text()
    return time.monotonic() - begin

  def disturb(self, seed: int, seconds: float) -> tuple[signal.Signals, ...]:
    """Starts it, sends signals at a time within its usual `seconds`, and checks how it ends; () if it ended before."""
    schedule = random.Random(f"{self.run.__name__} {seed}")
    way, process = schedule.choice(WAYS), self.start()
    process.join(schedule.uniform(0, seconds))
    if process.exitcode is not None:
      assert process.exitcode == 0, (self.folder / "errors").read_text()
      return ()
    for number in way:
      os.kill(process.pid, number)
      process.join(schedule.choice((0.01, 0.1, 1.0)))
      if process.exitcode is not None:
        break
    process.join(120)
    errors = (self.folder / "errors").read_text(errors="replace")
    # 0: saved, served, or just finished. Before a command handles SIGTERM, it is ended by it.
    expected = {KILL: (0, -KILL), TERM: (0, -TERM, 130), INT: (0, 130)}[way[0]]
    expected += (-TERM, 130) if way[1:] else ()
    assert process.exitcode in expected, (seed, way, errors)
    assert not re.search("Traceback|Exception ignored|Segmentation|Fatal", errors), (seed, way, errors)
    return way


def test_sweeps(tmp_path):
  seconds, ways = 0.0, []
  for name in ("first", "whole"):  # The first one starts the server from which processes are forked.
    (tmp_path / name).mkdir()
    seconds = Command(sweep, tmp_path / name).finish()
  for number in range(10):
    disturbed = Command(sweep, tmp_path / str(number))
    disturbed.folder.mkdir()
    ways += [disturbed.disturb(2 * number + i, seconds) for i in range(2)]
    disturbed.finish()
    runs = json.loads((disturbed.folder / "sweep/sweep.json").read_text())["runs"]
    assert [run["state"] for run in runs] == ["finished"] * 2
  assert sum(map(bool, ways)) > 8


def ask_for_images(folder: Path, is_over: threading.Event) -> None:
  """Asks a server, as soon as there is one, for one image after the other."""
  body = json.dumps({"model": "uae", "prompt": "a red circle", "size": "16x16"}).encode()
  while not is_over.wait(0.02):
    if address := re.search(r"http://\S+", (folder / "out").read_text()):
      request = urllib.request.Request(f"{address[0]}/images/generations", body, {"Content-Type": "application/json"})
      try:
        urllib.request.urlopen(request, timeout=5).close()
      except OSError:  # it has ended
        return


def test_serving(tmp_path):
  (tmp_path / "out").touch()
  served, ways = Command(serve, tmp_path), []
  for seed in range(30):
    is_over = threading.Event()
    client = threading.Thread(target=ask_for_images, args=(tmp_path, is_over))
    client.start()
    ways.append(served.disturb(seed, 3.0))
    is_over.set()
    client.join()
  assert all(ways)

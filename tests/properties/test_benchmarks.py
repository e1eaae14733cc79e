"""The benchmark harness: backends alternate in separate processes, and results become tables and bar charts."""

import contextlib
import ctypes
import json
import os
from pathlib import Path
import queue
import subprocess
import sys
import threading

import pytest

from benchmarks.__main__ import main, parse
from benchmarks.growth import curves, exponent
from benchmarks.measure import measure
from benchmarks.native import mkl
from benchmarks.pieces import PIECES
from benchmarks.plot import chart
from benchmarks.processes import Backend, Clock, OutOfTime, Settings
from benchmarks.results import Results
from benchmarks.table import table

ROOT = Path(__file__).parents[2]
# Hides what a rented machine with an accelerator may lack; Python imports this file at its start.
BLOCKER = """
from importlib.machinery import PathFinder
NAMES = {"tensorflow", "grain", "clu", "orbax", "ml_collections", "tensorflow_datasets", "diffusers", "peft", "qwix"}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *given: None if name.split(".")[0] in NAMES else find(name, *given)
"""


def row(backend, seconds, **fields):
  common = dict(
    suite="rollout",
    case="G=8",
    backend=backend,
    unit="tokens",
    amount=8.0,
    flops=None,
    bytes=None,
    facts={},
    seconds=seconds,
    fastest=seconds,
    slowest=seconds,
    processor_seconds=seconds,
    rate=8 / seconds,
    memory_peak_mb=1.0,
    seconds_compile=0.5,
    check=None,
  )
  return common | fields


def test_ours_is_compared_with_the_fastest_peer_and_with_the_roof():
  rows = [
    row("torch", 0.5, suite="roof", case="matrix product", flops=1e9),
    row("uae_jax", 0.25, flops=2.5e8, check=[1.0, 4.0]),
    row("torch", 2.0, check=[1.0, 2.0]),
    row("torch_compiled", 1.0),
    {"suite": "stage2", "case": "", "backend": "torch", "error": "RuntimeError: no compiler"},
  ]
  text = table(rows)
  ours = next(line for line in text.splitlines() if "| uae_jax |" in line)
  assert "| 4x |" in ours and "| 50% |" in ours
  assert "differ by 5.0e-01" in text and "no compiler" in text
  svg = chart(rows)
  assert svg.count("<rect") == 1 + 3 + 3 and "4.00 (1 s)" in svg


def test_growth_is_fitted():
  rows = [
    row("uae_jax", factor * x**power, facts={"axis": "group", "x": x, "series": series, "temporaries_mb": 5.0 * x})
    for series, factor, power in (("shared", 3.0, 0), ("repeated", 2.0, 1))
    for x in (1, 2, 4)
  ]
  shared, repeated = curves(rows)["group"].values()
  assert exponent(shared, "time") == pytest.approx(0) and exponent(repeated, "time") == pytest.approx(1)
  assert exponent(shared, "arguments") is None and exponent(shared[:1], "time") is None
  lines = {line.split(" | ")[0]: line for line in table(rows).splitlines()}
  assert lines["| group"].split(" | ")[1:3] == ["shared time, s", "shared temporaries, MB"]
  assert lines["| 4"] == "| 4 | 3 | 20.0 | 0.5 | 8 | 20.0 | 0.5 |"
  assert lines["| exponent"] == "| exponent | 0.00 | 1.00 | 0.00 | 1.00 | 1.00 | 0.00 |"


def test_a_worker_measures_and_a_failure_is_a_result(tmp_path):
  settings = Settings(tmp_path, threads=1)
  with open(tmp_path / "log.txt", "w") as log, contextlib.ExitStack() as stack:
    backends = [stack.enter_context(Backend("roof", name, "small", settings, log)) for name in ("uae_jax", "nothing")]
    rows = list(measure(backends, 2, Clock(), lambda case, backend: case == "attention"))
  failed, *measured = rows
  assert failed["backend"] == "nothing" and failed["error"]
  assert [r["case"] for r in measured] == ["matrix product", "matrix reading", "memory copy"]
  for found in measured:
    assert len(found["samples"]) == 2 and 0 < found["fastest"] <= found["seconds"] <= found["slowest"]
    assert found["memory_peak_mb"] > 0 and found["about"]["jax"]
  json.dumps(rows)


class FakeBackend(Backend):
  """A worker that answers from a script in a shell, so that nothing is imported."""

  SCRIPT = """
    read line; echo '{"cases": ["quick", "slow", "last"], "about": {}}'
    while read line; do case "$line" in
      *slow*) sleep 60;;
      *prepare*) echo '{"is_once": true, "sample": [2.0, 1.0], "amount": 4}';;
      *) echo '{}';;
    esac; done"""

  def _start(self):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._process = subprocess.Popen(["bash", "-c", self.SCRIPT], **pipes)
    self._lines = queue.Queue()
    threading.Thread(target=self._read, args=(self._process.stdout, self._lines), daemon=True).start()


def test_a_case_without_answer_has_failed_and_the_next_one_runs(tmp_path):
  with FakeBackend("roof", "uae_jax", "small", Settings(tmp_path, 1), None) as backend:
    quick, slow, last = measure([backend], 3, Clock(None, case_seconds=1.0))
  assert (quick["seconds"], quick["rate"], quick["repeats"]) == (2.0, 2.0, 1)
  assert slow["error"] == "no answer within 1 s" and last["seconds"] == 2.0


def test_the_time_of_a_run_ends_without_a_row_of_the_case(tmp_path):
  with FakeBackend("roof", "uae_jax", "small", Settings(tmp_path, 1), None) as backend:
    rows = measure([backend], 3, Clock(1.0))
    assert next(rows)["case"] == "quick"
    with pytest.raises(OutOfTime):
      next(rows)


def test_a_run_goes_on_where_it_was_killed(tmp_path):
  rows = [
    row("uae_jax", 1.0, size="gpu"),
    {"suite": "vae", "size": "gpu", "case": "", "backend": "torch", "error": "x"},
  ]
  results = Results(tmp_path)
  for line in rows:
    results.add(line)
  results.finish("rollout", "gpu", ["uae_jax"])
  results.finish("vae", "gpu", ["torch"])
  with open(tmp_path / "results.jsonl", "a") as file:
    file.write('{"suite": "stage2", "ca')  # killed here
  again = Results(tmp_path)
  assert again.rows == rows and again.has("rollout", "gpu", "G=8", "uae_jax")
  assert not again.has("rollout", "gpu", "G=8", "torch")
  assert again.is_finished("rollout", "gpu", "uae_jax") and again.is_finished("vae", "gpu", "torch")
  assert "| rollout | G=8 |" in (tmp_path / "results.md").read_text()
  again.add(row("torch", 2.0, size="gpu"))
  assert len(Results(tmp_path).rows) == 3
  retried = Results(tmp_path, retries=True)
  assert len(retried.rows) == 2 and not retried.is_finished("vae", "gpu", "torch")


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / "results.jsonl").write_text("{}\nnonsense\n{}\n")
  with pytest.raises(ValueError, match="results.jsonl, line 2 is damaged"):
    Results(tmp_path)


def test_peers_with_the_best_kernels_have_a_ratio_of_their_own():
  rows = [row("uae_jax", 1.0), row("torch", 4.0), row("torch_mkl_native", 3.0)]
  lines = {line.split(" | ")[2]: line for line in table(rows).splitlines() if line.count(" | ") > 5}
  assert lines["backend"].endswith("| ratio, MKL native |")
  assert "| 4x |" in lines["uae_jax"] and lines["uae_jax"].endswith("| 3x |")
  assert chart(rows).count("<rect") == 1 + 3 + 3


def test_training_is_compared_between_platforms():
  rows = [
    row("uae_jax", 1.0, suite="learning", case=f"{platform} {seed}")
    | {"facts": {"stage": "stage 2", "platform": platform, "curves": {"reward": [start] * 5 + [end] * 5}}}
    for platform, seed, start, end in (("cpu", 0, 0.5, 0.7), ("cpu", 1, 0.5, 0.9), ("H100", 0, 0.4, 0.8))
  ]
  text = table(rows)
  assert "| cpu | 2 | 10 | 0.5000 | 0.8000 | 0.7000 to 0.9000 |" in text
  assert "| H100 | 1 | 10 | 0.4000 | 0.8000 | 0.8000 to 0.8000 |" in text


def test_mkl_is_built():
  assert ctypes.CDLL(str(mkl.library())).mkl_serv_intel_cpu_true() == 1


def test_an_unknown_suite_is_named(capsys):
  with pytest.raises(SystemExit):
    parse(["--suites", "rollout,nonsense", "--out", "x"])
  assert "--suites: 'nonsense' is not known" in capsys.readouterr().err


def test_pieces_have_names_and_numbers():
  arguments = parse(["--preset", "gpu", "--piece", "1,encoders", "--out", "x"])
  assert [(work.suite, work.size) for work in arguments.work] == [("roof", "gpu"), ("embedders", "gpu"), ("vae", "gpu")]
  assert arguments.work[0].groups == (("uae_jax",), ("torch_compiled",), ("torch",))
  assert [work.size for work in parse(["--preset", "tpu", "--out", "x"]).work][-1] == "tpu_large"
  assert all(work.groups == (("uae_jax",),) for work in parse(["--preset", "tpu", "--out", "x"]).work)


def test_an_unknown_piece_is_named(capsys):
  with pytest.raises(SystemExit):
    parse(["--preset", "gpu", "--piece", "17", "--out", "x"])
  assert "--piece: '17' is not known; expected all, or some of 1 roofs, 2 sampling" in capsys.readouterr().err


def bare(tmp_path) -> dict[str, str]:
  """The environment of a machine without the packages of `BLOCKER`."""
  (tmp_path / "sitecustomize.py").write_text(BLOCKER)
  return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"}


def test_the_pieces_import_nothing_that_a_bare_machine_lacks(tmp_path):
  suites = sorted({suite for piece in PIECES for suite in piece.suites})
  code = f"""
from benchmarks import __main__, world
from benchmarks.worker import import_suite
for suite in {suites}:
  import_suite(suite, "uae_jax")
  if suite != "learning":
    import_suite(suite, "torch")
"""
  subprocess.run([sys.executable, "-c", code], check=True, env=bare(tmp_path))


@pytest.mark.slow
def test_every_piece_runs_on_a_bare_machine(tmp_path, monkeypatch):
  for name, value in bare(tmp_path).items():
    monkeypatch.setenv(name, value)
  pieces = ",".join(piece.name for piece in PIECES if piece.name != "learning")
  common = ["--preset", "gpu", "--shapes", "small", "--backends", "uae_jax,torch", "--repeats", "1"]
  assert main([*common, "--piece", pieces, "--out", str(tmp_path / "out")]) == 0
  text = (tmp_path / "out" / "results.md").read_text()
  found = [float(line.rpartition("by ")[2].split()[0]) for line in text.splitlines() if "numbers differ" in line]
  assert len(found) == 9 and max(found) < 1e-4

"""The benchmark harness: backends alternate in separate processes, and results become tables and bar charts."""

import json

import pytest

from benchmarks.__main__ import parse
from benchmarks.growth import curves, exponent
from benchmarks.measure import measure
from benchmarks.plot import chart
from benchmarks.table import table


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
  with open(tmp_path / "log.txt", "w") as log:
    rows = measure("roof", ["uae_jax", "nothing"], "small", tmp_path, 2, 1, log)
  failed, *measured = rows
  assert failed["backend"] == "nothing" and failed["error"]
  assert [r["case"] for r in measured] == ["matrix product", "matrix reading"]
  for found in measured:
    assert len(found["samples"]) == 2 and 0 < found["fastest"] <= found["seconds"] <= found["slowest"]
    assert found["memory_peak_mb"] > 0
  json.dumps(rows)


def test_an_unknown_suite_is_named(capsys):
  with pytest.raises(SystemExit):
    parse(["--suites", "rollout,nonsense", "--out", "x"])
  assert "--suites: 'nonsense' is not known" in capsys.readouterr().err

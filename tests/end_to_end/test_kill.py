"""A run that is killed at random times ends bit for bit like an uninterrupted run."""

import pytest

from benchmarks.kill_resume import kill_repeatedly, outcome
from tests.end_to_end import small_run


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, kills):
  result = kill_repeatedly(
    tmp_path,
    small_run.run,
    lambda run: outcome(run / "checkpoints" / str(small_run.STEPS) / "params", run / "metrics.jsonl"),
    preload=["tests.end_to_end.small_run"],
    kills=kills,
    seed=0,
  )
  assert result["kills"] == kills
  assert result["differences"] == []

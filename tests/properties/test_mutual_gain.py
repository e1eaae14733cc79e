"""Cells of the mutual-gain experiment are valid configs, and the benchmark resumes and makes nothing up."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import mutual_gain, mutual_gain_figure
from configs import mutual_gain as grid
from uae_jax.options import read_config
from uae_jax.training.validate import validate

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("cell", grid.CELLS)
def test_a_cell_is_valid(cell):
  config = grid.get_config(cell)
  start = grid.start_of(cell)
  if start is not None:
    config.init.checkpoint = f"base:{start[1]}"
    assert start[1] == grid.get_config(start[0]).stages[-1]
  validate(read_config(config))


def test_rounds_have_the_updates_of_one_pass():
  def updates(treatment: str) -> list[int]:
    config = grid.get_config(f"third.{treatment}")
    return [config.rounds * config[name].total_steps for name in (grid.CAPTIONER, grid.DECODER)]

  assert updates("one_pass") == updates("two_rounds") == updates("four_rounds")


def test_starts_come_first():
  assert mutual_gain.needed(["third.one_pass"]) == ["base", "third", "third.one_pass"]
  assert mutual_gain.needed(["none.understanding"]) == ["base", "none.understanding"]
  assert mutual_gain.needed(grid.CELLS) == list(grid.CELLS)


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
  """The commands that were run; measuring a run gives 0.5, and 0.6 after a treatment."""
  commands = []

  def train(words, workdir, seconds):
    commands.append(words)
    return True

  def measure(workdir, num_images):
    value = 0.6 if "." in workdir.name else 0.5
    rows = {name: [value, value, value + 0.1] for name in mutual_gain.understanding.PAIRED}
    workdir.mkdir(parents=True)
    return {"images": 3, "figures": dict.fromkeys(mutual_gain.COLUMNS, value), "rows": rows, "seconds": 1.0}

  monkeypatch.setattr(mutual_gain, "train", train)
  monkeypatch.setattr(mutual_gain, "measure", measure)
  return commands


def test_the_benchmark_resumes_and_reports_what_was_measured(trained, tmp_path, capsys):
  arguments = [f"--out={tmp_path}", "--seeds=0", "--cells=third.one_pass", "--config.data.variant=rich"]
  assert mutual_gain.main(arguments) == 0
  assert [words[4].rpartition(":")[2] for words in trained] == ["base", "third", "third.one_pass"]
  assert trained[-1][-1] == f"--config.init.checkpoint={tmp_path}/seed-0/third:cold_start"
  assert all("--config.data.variant=rich" in words for words in trained)
  results = json.loads((tmp_path / "mutual_gain.json").read_text())
  assert results["seeds"] == [0] and list(results["cells"]["0"]) == ["base", "third", "third.one_pass"]
  gain = results["cells"]["0"]["third.one_pass"]["gains"]["forced_choice"]
  assert gain["gain"] == pytest.approx(0.1) and np.isfinite(gain["standard_error"])
  assert "| third.one_pass | 0 | +0.100 ± 0.000 |" in capsys.readouterr().out
  x, x_error, y, y_error = mutual_gain_figure.points(results)["third.one_pass"]
  assert (x, y) == pytest.approx((0.1, 0.1)) and x_error == y_error == pytest.approx(gain["standard_error"])
  shown = [f"--show={tmp_path}/mutual_gain.json", f"--figure={tmp_path}/figure.svg"]
  assert mutual_gain.main(shown) == 0
  labels = list(ElementTree.parse(tmp_path / "figure.svg").getroot().itertext())
  assert "1 third: one_pass" in labels
  trained.clear()
  assert mutual_gain.main([f"--out={tmp_path}", "--seeds=0,1", *arguments[2:]]) == 0
  assert {words[5] for words in trained} == {f"--workdir={tmp_path}/seed-1/{c}" for c in results["cells"]["0"]}


def test_a_run_out_of_time_is_not_measured(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(mutual_gain, "train", lambda *_: False)
  assert mutual_gain.main([f"--out={tmp_path}", "--seeds=0", "--minutes=1"]) == 0
  results = json.loads((tmp_path / "mutual_gain.json").read_text())
  assert results == {"recipe": mutual_gain.recipe([]), "seeds": [], "cells": {}}


def test_a_recipe_is_what_the_configs_set(monkeypatch):
  before, get_config = mutual_gain.recipe([]), grid.get_config
  assert mutual_gain.recipe(["--config.vae.total_steps=3"]) != before == mutual_gain.recipe([])

  def other(cell):
    config = get_config(cell)
    config.pretrain.optimizer.learning_rate = 1e-3
    return config

  monkeypatch.setattr(grid, "get_config", other)
  assert mutual_gain.recipe([]) != before


def test_results_of_two_machines_come_together(trained, tmp_path):
  results = f"--results={tmp_path}/all.json"
  for machine, seed in enumerate((2, 0)):
    assert mutual_gain.main([f"--out={tmp_path / str(machine)}", f"--seeds={seed}", "--cells=third", results]) == 0
  found = json.loads((tmp_path / "all.json").read_text())
  assert found["seeds"] == [0, 2] and all(list(cells) == ["base", "third"] for cells in found["cells"].values())
  trained.clear()
  with pytest.raises(SystemExit):
    mutual_gain.main([f"--out={tmp_path / '2'}", "--seeds=1", "--config.vae.total_steps=3", results])
  assert not trained


@pytest.mark.parametrize("flags", (["--cells=x*", "--out=x"], ["--figure=x", "--out=x"], ["--seed=0", "--out=x"], []))
def test_wrong_calls_run_nothing(trained, flags):
  with pytest.raises(SystemExit):
    mutual_gain.main(flags)
  assert not trained

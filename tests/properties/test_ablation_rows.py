"""Every row of the ablations is a valid config, and the table of the runner states the results of the runs."""

import json
from pathlib import Path

import pytest

from benchmarks import ablations
from configs import scenes, scenes_ablations
from uae_jax.options import REINFORCEMENT, read_config
from uae_jax.training import stage
from uae_jax.training.stages import spec
from uae_jax.training.validate import validate

pytestmark = pytest.mark.fast

ROWS = scenes_ablations.ROWS


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_valid_and_starts_before_its_stages(row):
  row_config = scenes_ablations.get_config(row)
  row_config.init.checkpoint = f"base:{ROWS[row]['start']}"
  config = read_config(row_config)
  validate(config)
  order = list(scenes.get_config().stages)
  assert order.index(ROWS[row]["start"]) < order.index(config.stages[0])

  class Built:
    """The attributes that the makers of phases access before they are called."""

    class networks:
      prompts, embedders = None, dict.fromkeys(config.embedders)

    class processor:
      control_ids = ()

  for name in config.stages:
    optimizer, _, _ = stage.stage_optimizer(config.section(name))
    if name in REINFORCEMENT:
      assert stage.make_phases(config, name, Built, optimizer)
    else:
      assert spec.find(name).make_loss(config, Built)


def test_rows_differ_and_unknown_ones_are_refused():
  plain = {row: json.dumps(scenes_ablations.get_config(row).to_dict(), sort_keys=True) for row in ROWS}
  assert len(set(plain.values())) == len(ROWS)
  with pytest.raises(ValueError, match="expected one of"):
    scenes_ablations.get_config("no_such_row")
  points = []
  scenes_ablations.sweep(lambda **fields: points.append(fields))
  assert len(points) == len(ROWS)


def test_two_rounds_have_the_updates_of_one_pass():
  one, two = (scenes_ablations.get_config(row) for row in ("one_pass", "two_rounds"))
  for name in REINFORCEMENT:
    assert two.rounds * two[name].total_steps == one.rounds * one[name].total_steps


def write_run(folder: Path, stage_name: str, recall: float, gain: float | None):
  figures = {
    "caption_recall": recall,
    "caption_precision": 0.9,
    "caption_length": 12.0,
    "psnr": 20.0,
    "object_accuracy": 0.5,
  }
  figures |= {"reward_similarity": 0.95, "held_out_similarity": 0.94}
  if gain is not None:
    names = ("reward_similarity", "held_out_similarity", "psnr")
    figures["paired"] = {name: {"gain": gain, "standard_error": 0.001} for name in names}
  (folder / "evaluation").mkdir(parents=True)
  (folder / "evaluation" / f"{stage_name}.json").write_text(json.dumps(figures))
  (folder / ablations.COST).write_text('{"cpu_minutes": 4.0}')


def test_the_table_has_mean_and_range_over_seeds(tmp_path, monkeypatch, capsys):
  for seed, recall in ((0, 0.8), (1, 0.9)):
    write_run(tmp_path / "gspo" / f"seed{seed}", "generation_for_understanding", recall, None)
  write_run(tmp_path / "default" / "seed1", "generation_for_understanding", 0.75, None)
  write_run(tmp_path / "nft" / "seed0", "understanding_for_generation", 0.9, 0.01)
  monkeypatch.setattr("sys.argv", ["ablations", "--base", str(tmp_path), "--out", str(tmp_path)])
  ablations.main()
  text = capsys.readouterr().out
  assert "| gspo | 0 1 | 0.850 (0.800 to 0.900) | 0.900 (0.900 to 0.900) | 12.0 (12.0 to 12.0) |" in text
  assert "| 4.000 (4.000 to 4.000) |" in text
  assert "| gspo | default | 1 | +0.150 | +0.0000 | +0.0000 | +0.0000 | +0.0000 | +0.0000 |" in text
  assert "| nft | 0 | 0.0100 ± 0.0010 |" in text
  assert json.loads((tmp_path / "ablations.json").read_text())["gspo"]["1"]["caption_recall"] == 0.9

"""Every row of the ablations is a valid config, and the table of the runner states the results of the runs."""

import json

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
  scenes_ablations.sweep(lambda name, **fields: points.append(name))
  assert points == list(ROWS)


def test_two_rounds_have_the_updates_of_one_pass():
  one, two = (scenes_ablations.get_config(row) for row in ("one_pass", "two_rounds"))
  for name in set(one.stages) & set(REINFORCEMENT):
    assert two.rounds * two[name].total_steps == one.rounds * one[name].total_steps


def run(row: str, seed: int, recall: float, gain: float | None) -> dict:
  metrics = {
    "caption_recall": recall,
    "caption_precision": 0.9,
    "caption_length": 12.0,
    "psnr": 20.0,
    "object_accuracy": 0.5,
    "reward_similarity": 0.95,
    "held_out_similarity": 0.94,
    "seconds": 240.0,
  }
  if gain is not None:
    for name in ("reward_similarity", "held_out_similarity", "psnr"):
      metrics |= {f"paired.{name}.gain": gain, f"paired.{name}.standard_error": 0.001}
  return {"name": f"{row}_seed-{seed}", "overrides": {"seed": str(seed)}, "state": "finished", "metrics": metrics}


def test_the_table_has_mean_and_range_over_seeds(tmp_path, monkeypatch, capsys):
  runs = [run("gspo", 0, 0.8, None), run("gspo", 1, 0.9, None), run("default", 1, 0.75, None), run("nft", 0, 0.9, 0.01)]
  unfinished = run("dapo", 0, 0.1, None) | {"state": "failed"}
  (tmp_path / "sweep.json").write_text(json.dumps({"runs": [*runs, unfinished]}))
  monkeypatch.setattr("sys.argv", ["ablations", str(tmp_path)])
  ablations.main()
  text = capsys.readouterr().out
  assert "| gspo | 0 1 | 0.850 (0.800 to 0.900) | 0.900 (0.900 to 0.900) | 12.0 (12.0 to 12.0) |" in text
  assert "| 4.000 (4.000 to 4.000) |" in text
  assert "| gspo | default | 1 | +0.150 | +0.0000 | +0.0000 | +0.0000 | +0.0000 | +0.0000 |" in text
  assert "| nft | 0 | 0.0100 ± 0.0010 |" in text and "dapo" not in text
  assert (tmp_path / "ablations.md").read_text() == text.removesuffix("\n")

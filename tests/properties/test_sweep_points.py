"""Points of a sweep: grids, reproducible draws, names of folders, and values that depend on other fields."""

import pytest

from configs import scenes, scenes_ablations
from launch import jobset, xpk
from uae_jax.commands import config_file, sweep
from uae_jax.sweeps import points

pytestmark = pytest.mark.fast

NOTHING = [("", ())]


def names(grid=(), draw=(), num=1, base=NOTHING):
  return [point.name for point in points.combine(base, points.grid(grid), points.draws(draw, num, 0))]


def test_a_grid_has_every_combination():
  assert names(["config.seed=0,1", "config.pretrain.optimizer.learning_rate=1e-4,1e-3"]) == [
    f"seed-{seed}_learning_rate-{rate}" for seed in (0, 1) for rate in ("1e-4", "1e-3")
  ]


def test_commas_within_brackets_do_not_separate_values():
  assert points.split_values('("clip",),("clip","vae"), (("a",1.0),("b",2.0)),x') == [
    '("clip",)',
    '("clip","vae")',
    '(("a",1.0),("b",2.0))',
    "x",
  ]


def test_draws_are_reproducible_and_grow():
  texts = ["config.a=loguniform(1e-4,1e-2)", "config.b=integer(2,4)", "config.c=choice(x,y)", "config.d=uniform(-1,1)"]
  few, many = points.draws(texts, 3, seed=1), points.draws(texts, 200, seed=1)
  assert many[:3] == few and points.draws(texts, 3, seed=2) != few
  a, b, c, d = ([dict(point)[field] for point in many] for field in "abcd")
  assert all(1e-4 <= float(x) <= 1e-2 for x in a) and 60 < sum(float(x) < 1e-3 for x in a) < 140
  assert set(b) == {"2", "3", "4"} and set(c) == {"x", "y"} and min(map(float, d)) < -0.8


@pytest.mark.parametrize(
  ("function", "text", "said"),
  [
    ("grid", "config.seed", "--grid config.seed: expected config.FIELD=VALUE,VALUE,..."),
    ("draws", "config.a=normal(0,1)", "--draw config.a=normal.*: expected uniform.*loguniform.*integer.*choice"),
    ("draws", "config.a=loguniform(0,1)", "expected uniform"),
    ("draws", "config.a=uniform(2,1)", "expected uniform"),
    ("draws", "config.a=integer(0.5,1)", "expected uniform"),
    ("draws", "config.a=uniform(0,inf)", "expected uniform"),
    ("draws", "config.a=choice()", "expected uniform"),
    ("grid", "config.seed=,", "expected config.FIELD=VALUE,VALUE,..."),
  ],
)
def test_what_is_no_grid_and_no_draw_is_refused(function, text, said):
  with pytest.raises(ValueError, match=said):
    points.grid([text]) if function == "grid" else points.draws([text], 1, 0)


def test_draws_differ_from_each_other():
  assert sorted(names(draw=["config.seed=integer(1,3)"], num=3)) == ["seed-1", "seed-2", "seed-3"]
  with pytest.raises(ValueError, match="--num=3: only 2 different points were drawn from seed"):
    points.draws(["config.seed=integer(1,2)"], 3, 0)


def test_a_field_is_given_once(tmp_path):
  with pytest.raises(ValueError, match="--grid config.seed=2: seed has a grid already"):
    points.grid(["config.seed=1", "config.seed=2"])
  with pytest.raises(ValueError, match="--draw seed=.*: seed is drawn already"):
    points.draws(["config.seed=integer(1,2)", "seed=integer(3,4)"], 2, 0)
  argv = ["--config=configs/scenes.py", f"--workdir={tmp_path}", "--grid=config.seed=1", "--draw=seed=integer(2,9)"]
  with pytest.raises(Exception, match="--grid and --draw both give seed"):
    sweep.make_sweep(sweep.parser().parse_args(argv), [])


def test_folder_names_are_short_safe_and_unique():
  (long,) = names([f"config.init.checkpoint={'/very/long' * 20}:cold start"])
  assert len(long) <= 80 and "/" not in long and " " not in long
  assert names(["config.a.seed=1", "config.b.seed=2"]) == ["a.seed-1_b.seed-2"]
  assert names() == ["default"]
  with pytest.raises(ValueError, match="contains seed-1 twice"):
    names(["config.seed=1,1"])


def test_points_of_a_config_are_combined_with_a_grid():
  bases = points.from_config(scenes_ablations.sweep)
  found = {point.name: point for point in points.combine(bases, points.grid(["config.seed=0,1"]))}
  assert len(found) == 2 * len(scenes_ablations.ROWS)
  flags = found["answer_seed-1"].flags
  assert "--config.seed=1" in flags and "--config.init.checkpoint=runs/seeds/seed-1:pretrain" in flags
  assert names(base=points.from_config(scenes.sweep)) == ["seed-0", "seed-1", "seed-2"]


def test_every_ablation_is_a_valid_run(tmp_path):
  argv = ["--config=configs/scenes_ablations.py", f"--workdir={tmp_path}", "--only=*o*"]
  found = sweep.make_sweep(sweep.parser().parse_args(argv), [])
  assert 3 < len(found.points) < len(scenes_ablations.ROWS)
  assert found.experiments["two_rounds"].rounds == 2
  assert found.experiments["two_rounds"].init.checkpoint == "runs/seeds/seed-0:cold_start"


def test_a_wrong_point_is_named_before_anything_runs(tmp_path):
  argv = ["--config=configs/scenes.py", f"--workdir={tmp_path}", "--grid=config.pretrain.batch_size=8,-1"]
  with pytest.raises(Exception, match="batch_size--1: .*pretrain.batch_size = -1: expected 1 or more"):
    sweep.make_sweep(sweep.parser().parse_args(argv), [])


def test_a_sweep_of_nothing_is_refused(tmp_path):
  file = tmp_path / "plain.py"
  file.write_text("from uae_jax.options import new_config as get_config")
  with pytest.raises(ValueError, match=r"defines no sweep\(add\); give --grid or --draw"):
    sweep.make_sweep(sweep.parser().parse_args([f"--config={file}", f"--workdir={tmp_path}"]), [])
  assert config_file.load_config(str(file)).seed == 0


@pytest.mark.parametrize(
  "flags", [["--halving=0.5,0.25"], ["--halving=1"], ["--halving=x"], ["--halving=0.5", "--keep=1"]]
)
def test_halving_needs_increasing_fractions(flags):
  with pytest.raises(Exception, match="expected increasing fractions|expected a share"):
    sweep.fractions_of(sweep.parser().parse_args(["--config=x", "--workdir=y", *flags]))


def test_job_names_suit_every_engine():
  found = {sweep.job_name("2026 Sweep", f"learning_rate-{10**-k}_long_name_of_a_point") for k in range(9)}
  assert len(found) == 9 and all(name[0] == "s" for name in found)
  flags = ["--config=c.py", "--workdir=gs://bucket/run", "--topology=v5e:16x16", "--slices=99", "--image=image"]
  for name in found:
    for engine, argv in ((jobset, ["render"]), (xpk, ["create", "--cluster=tpus", "--dry-run"])):
      assert engine.main([*argv, name, *flags]) == 0


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[1]"])
def test_a_damaged_list_of_submitted_runs_is_refused(tmp_path, content):
  file = tmp_path / "submitted.json"
  assert sweep.read_submitted(file) == []
  file.write_text(content)
  with pytest.raises(ValueError, match=r"submitted.json: not a list of submitted runs"):
    sweep.read_submitted(file)

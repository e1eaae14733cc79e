"""The smoke config runs every stage, and its output works with the report, the Python API and the commands."""

import dataclasses
import json
from pathlib import Path
import subprocess
import sys

from ml_collections import ConfigDict
import nbclient
import nbformat
import numpy as np
from PIL import Image
import pytest
import skimage.data

import uae_jax
from uae_jax import cli
from uae_jax.commands import train as train_command
from uae_jax.commands.config_file import load_config
from uae_jax.commands.train import train
from uae_jax.options import read_config
from uae_jax.training.workdir import open_workdir

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "scenes.py"
NOTEBOOK = ROOT / "examples" / "uae_in_ten_minutes.ipynb"


STAGES = [(folder, stage) for folder, stage in read_config(load_config(f"{CONFIG}:smoke")).runs]


def smoke_config() -> ConfigDict:
  return load_config(f"{CONFIG}:smoke")


def run_smoke(workdir: Path, *flags: str) -> subprocess.CompletedProcess:
  """Runs `uae-jax train` on the smoke config in a separate process with one device, as on a laptop."""
  command = [sys.executable, "-m", "uae_jax.cli", "train", f"--config={CONFIG}:smoke", f"--workdir={workdir}", *flags]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
  parent = tmp_path_factory.mktemp("run")
  folder, domain = parent / "smoke", parent / "pictures" / "noise"
  domain.mkdir(parents=True)
  for seed in range(3):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(domain / f"{seed}.png")
  done = run_smoke(
    folder,
    "--config.evaluation.periodic.every_steps=2",
    "--config.evaluation.periodic.num_images=2",
    f"--config.evaluation.suites.names=transfer:{parent / 'pictures'}",
    "--config.evaluation.suites.limit=2",
  )
  assert done.returncode == 0, done.stderr
  assert str(folder / "report" / "index.html") in done.stdout
  return folder


def test_every_stage_leaves_metrics_figures_and_a_checkpoint(workdir):
  config = read_config(smoke_config())
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert json.loads((workdir / "config.json").read_text())["seed"] == config.seed
  for folder, stage in config.runs:
    assert {line["step"] for line in lines if line["stage"] == stage} >= {1, 2}
    assert (workdir / "evaluation" / f"{folder}.json").exists()
    assert (workdir / "checkpoints" / folder / "2" / "params").exists()
  names = ("caption_recall", "caption_precision", "caption_length", "reward_similarity", "held_out_similarity", "psnr")
  for stage in ("cold_start", "generation_for_understanding", "understanding_for_generation"):
    figures = json.loads((workdir / "evaluation" / f"{stage}.json").read_text())
    assert all(np.isfinite(figures[name]) for name in names)
    assert 0 <= figures["forced_choice"] <= 1 and "half_caption_recall" in figures
    assert 0 <= figures["true_caption_counting"] <= 1
    gallery = json.loads((workdir / "samples" / stage / "gallery.json").read_text())
    assert len(gallery["items"]) == config.evaluation.gallery_images
  assert list(workdir.glob("events.out.tfevents.*"))
  assert "<svg" in (workdir / "report" / "index.html").read_text()


def test_held_out_figures_are_measured_while_each_stage_trains(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  names = {"vae": "psnr", "captioner": "caption_recall", "clip": "edit_similarity", "dinov2": "edit_similarity"}
  for stage in read_config(smoke_config()).stages:
    name = f"evaluation_{names.get(stage, 'reward_similarity')}"
    measured = {line["step"]: line[name] for line in lines if line["stage"] == stage and name in line}
    assert measured.keys() == {0, 2} and all(map(np.isfinite, measured.values())), stage
  assert "Held-out similarity" in (workdir / "report" / "index.html").read_text()


def test_suites_run_before_and_after_each_stage_that_captions_and_generates(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  name = "suite_transfer_noise"
  steps = {stage: [line["step"] for line in lines if line["stage"] == stage and name in line] for _, stage in STAGES}
  trained = ("pretrain", "cold_start", "generation_for_understanding", "understanding_for_generation")
  assert steps == {stage: [0, 2] if stage in trained else [] for _, stage in STAGES}
  assert "suite transfer noise" in (workdir / "report" / "index.html").read_text()
  # The results of two stages can be compared.
  folders = [str(workdir / "evaluation" / "suites" / stage / "transfer") for stage in trained[1:3]]
  assert cli.main(["compare", *folders, "--page", str(workdir / "compare.html")]) == 0


def test_rl_stages_start_with_ratio_one_and_no_divergence(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for stage in ("generation_for_understanding", "understanding_for_generation"):
    first = next(line for line in lines if line["stage"] == stage and "ratio_mean" in line)
    assert first["step"] == 1
    assert first["ratio_mean"] == 1.0
    assert first["clip_fraction"] == 0.0
    # Rollout and replay are different programs; their log-probabilities agree up to rounding.
    assert first["log_prob_difference"] < 1e-5


def test_a_finished_run_is_not_run_again(workdir):
  before = (workdir / "metrics.jsonl").read_bytes()
  assert run_smoke(workdir).returncode == 0
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_changed_config_is_refused_by_name(workdir):
  done = run_smoke(workdir, "--config.pretrain.optimizer.weight_decay=0.5")
  assert done.returncode == 1
  line = done.stderr.strip().splitlines()[-1]
  assert "config.pretrain.optimizer.weight_decay: 0.0 -> 0.5" in line


@pytest.mark.parametrize(("is_finished", "exit_code"), [(True, 0), (False, 143)])
def test_the_exit_code_after_a_preemption_is_the_schedulers(monkeypatch, tmp_path, is_finished, exit_code):
  monkeypatch.setattr(train_command, "train", lambda *_, **__: is_finished)
  flags = ["--config=configs/scenes.py:smoke", f"--workdir={tmp_path}", "--preempted_exit_code=143"]
  assert train_command.main(flags) == exit_code


def test_a_foreign_folder_is_refused(tmp_path):
  (tmp_path / "holiday.txt").write_text("photographs")
  with pytest.raises(ValueError, match=r"not empty and holds no config\.json"):
    open_workdir(tmp_path, read_config(smoke_config()))
  assert (tmp_path / "holiday.txt").exists()


def test_impossible_settings_name_their_field(tmp_path):
  config = smoke_config()
  config.pretrain.batch_size = 0
  with pytest.raises(ValueError, match=r"config\.pretrain\.batch_size = 0"):
    train(read_config(config), tmp_path / "run")
  config = smoke_config()
  config.mesh.data = 3
  with pytest.raises(ValueError, match=r"config\.clip\.batch_size = 4 is not divisible"):
    train(read_config(config), tmp_path / "run")
  config.stages = ("pretrian",)
  with pytest.raises(ValueError, match="unknown stage 'pretrian'"):
    train(read_config(config), tmp_path / "run")
  config = read_config(smoke_config())
  with pytest.raises(ValueError, match=r"config\.embedders\.clpi: unknown kind of embedder, did you mean 'clip'\?"):
    train(dataclasses.replace(config, embedders={"clpi": "fresh"}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def trained(monkeypatch) -> list:
  """The config that `uae-jax train` would use; flags come from its arguments, not from those of this process."""
  calls = []
  monkeypatch.setattr(sys, "argv", ["pytest"])
  monkeypatch.setattr(train_command, "train", lambda config, workdir, **options: calls.append((config, workdir)))
  monkeypatch.setattr(train_command.compiler_flags, "add", lambda config: None)
  return calls


def test_correct_flags_are_obeyed(trained, tmp_path):
  argv = ["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--config.pretrain.batch_size=8"]
  assert cli.main(argv) == 0
  ((config, workdir),) = trained
  assert config.pretrain.batch_size == 8
  assert workdir == tmp_path / "run"


@pytest.mark.parametrize("flag", ["--config.pretrain.batchsize=8", "--config.pretrain.batch_size=eight"])
def test_mistyped_flags_are_one_line(flag, trained, tmp_path, capsys):
  code = cli.main(["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", flag])
  error = capsys.readouterr().err.strip()
  assert code == 2
  assert "\n" not in error and "config.pretrain.batch_size" in error
  assert not trained


@pytest.fixture(scope="module")
def uae(workdir):
  return uae_jax.UAE.load(workdir, dtype="float32")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
  """Ordinary images of several sizes and modes, and one file that is not an image."""
  folder = tmp_path_factory.mktemp("photographs")
  Image.fromarray(skimage.data.astronaut()).save(folder / "astronaut.jpg")
  Image.fromarray(skimage.data.camera()).save(folder / "camera.png")
  Image.fromarray(skimage.data.logo()).save(folder / "logo.png")  # RGBA
  Image.fromarray(skimage.data.coffee()).convert("P").save(folder / "coffee.png")
  return folder


def test_captions_are_greedy_at_zero_temperature_and_seeded_above(uae, photographs):
  images = sorted(photographs.iterdir())
  assert uae.caption(images, temperature=0.0, seed=1, max_new_tokens=8) == uae.caption(
    images, temperature=0.0, seed=2, max_new_tokens=8
  )
  sampled = uae.caption(images, temperature=2.0, seed=1, max_new_tokens=8)
  assert sampled == uae.caption(images, temperature=2.0, seed=1, max_new_tokens=8)
  assert sampled != uae.caption(images, temperature=2.0, seed=2, max_new_tokens=8)


def test_log_probs_cover_the_caption_and_its_end(uae, photographs):
  (log_probs,) = uae.log_probs([photographs / "camera.png"], ["black background ;"])
  assert log_probs.shape == (4,)
  assert np.all(log_probs < 0)


def test_generation_has_the_trained_size_and_is_seeded(uae):
  first, second = uae.generate(["black background ;"] * 2, steps=2, output="array")
  assert first.shape == (32, 32, 3)
  assert np.all((first >= 0) & (first <= 1))
  assert not np.array_equal(first, second)
  # Another batch size is another program, which rounds differently.
  np.testing.assert_allclose(first, uae.generate(["black background ;"], steps=2, output="array")[0], atol=1e-5)
  with pytest.raises(ValueError, match="multiples of"):
    uae.generate(["black background ;"], height=30)


def test_latents_round_trip(uae):
  images = np.zeros((2, 32, 32, 3), np.float32)
  latents = uae.encode_image(images)
  assert latents.shape == (2, 4, 4, 16)
  assert uae.decode_latents(latents).shape == images.shape
  context, mask = uae.encode_text(["black background ;", "teal background ; top-left small red circle ;"])
  assert mask.sum() < mask.size
  assert uae.velocity(latents, np.array([500.0, 20.0]), context).shape == latents.shape


def test_reconstruct_command_on_photographs(workdir, photographs, tmp_path, capsys):
  code = cli.main(
    ["reconstruct", "--model", str(workdir), "--images", str(photographs), "--out", str(tmp_path / "out")]
  )
  assert code == 0
  rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
  assert len(rows) == 4
  assert (tmp_path / "out" / "recon_astronaut.png").exists()
  assert "scenes" in capsys.readouterr().err


def check_notebook(workdir: Path, tmp_path: Path, monkeypatch) -> None:
  """Runs the notebook from top to bottom; nbclient raises if a cell fails."""
  monkeypatch.setenv("UAE_JAX_SMOKE", "1")
  monkeypatch.setenv("UAE_JAX_WORKDIR", str(workdir))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # ignores the user's IPython settings
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
  shown = [kind for output in outputs if output.output_type == "display_data" for kind in output.data]
  assert "before:" in printed and "after:" in printed and "reward_similarity" in printed
  assert shown.count("image/png") == 2 and "text/html" in shown


def test_the_notebook_is_stored_without_outputs():
  cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
  assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_the_notebook_runs_on_a_finished_run(workdir, tmp_path, monkeypatch):
  """The training cell of the notebook is the command of `run_smoke`, so it finds nothing left to do."""
  check_notebook(workdir, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_notebook_trains_from_scratch(tmp_path, monkeypatch):
  check_notebook(tmp_path / "run", tmp_path, monkeypatch)

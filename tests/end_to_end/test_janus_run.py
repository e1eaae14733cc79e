"""Both directions of Janus train on a folder of pictures, and all commands take the run."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from tests.janus_folder import SIDE, write_janus_folder
from uae_jax import cli
from uae_jax.api import UAE

CONFIG = Path(__file__).parents[2] / "configs" / "janus_pro_1b.py"
RL = ("generation_for_understanding", "image_tokens")
JOINT = "joint_tokens"
SMALL = {
  "model": "weights",
  "dtype": "float32",
  "mesh.data": 4,
  "mesh.fsdp": 2,
  "rounds": 1,
  "remat": "none",
  "embedders.dinov2": "",
  "data.image_px": SIDE,
  "data.caption_tokens": 8,
  "evaluation.num_images": 0,
  "evaluation.batch_size": 8,
  "evaluation.num_noises": 1,
  "evaluation.gallery_images": 2,
  "evaluation.max_new_tokens": 8,
  "evaluation.embedders": "('clip',)",
  "tensorboard": False,
} | {
  f"{name}.{field}": value
  for name in (*RL, JOINT)
  for field, value in {
    "total_steps": 1,
    "batch_size": 8,
    "optimizer.learning_rate": 1e-2,
    "options.num_rollouts": 3,
    "options.max_new_tokens": 8,
    "options.decode_chunks": 1,
    "options.logit_chunks": 1,
    "options.held_out_embedder": "",
  }.items()
}


def write_clip(folder: Path) -> None:
  torch.manual_seed(0)
  tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
  config = CLIPConfig(
    text_config=tower | {"vocab_size": 49}, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16
  )
  CLIPModel(config).save_pretrained(folder)
  size = {"shortest_edge": 32}
  CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def train(folder: Path, workdir: str = "run", **changes) -> int:
  given = SMALL | {
    "init.weights": folder / "model",
    "embedders.clip": folder / "clip",
    "data.source": f"folder:{folder}/pictures/{{split}}",
  }
  flags = [f"--config.{name}={value}" for name, value in (given | changes).items()]
  return cli.run(["train", f"--config={CONFIG}", f"--workdir={folder / workdir}", *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("janus")
  write_janus_folder(folder / "model")
  write_clip(folder / "clip")
  rng = np.random.default_rng(0)
  for split in ("train", "held_out"):
    pictures = folder / "pictures" / split
    pictures.mkdir(parents=True)
    for i in range(8):
      Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(pictures / f"{i}.png")
  return folder


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stages": "('vae',)"}, "config.stages names 'vae', which trains a model that has a decoder of its own"),
    (
      {"generation_for_understanding.options.sampler_steps": 20},
      "config.generation_for_understanding.options.sampler_steps = 20 does nothing with a model that generates images",
    ),
    ({"evaluation.shift": 2.0}, "config.evaluation.shift = 2.0 does nothing"),
    ({"data.image_px": 32}, "config.data.image_px = 32: 32 x 32 px: the model makes images of 24 x 24"),
    ({"model": "janus_pro_1b"}, "config.model = 'janus_pro_1b' has captioner "),
  ],
)
def test_what_cannot_work_is_refused_first(folder, capsys, changes, message):
  assert train(folder, **changes) != 0
  assert message in capsys.readouterr().err
  assert not (folder / "run" / "checkpoints").exists()


def test_both_directions_train_and_the_run_is_used(folder, tmp_path):
  assert train(folder) == 0
  rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
  for name in RL:
    (first, *_) = [row for row in rows if row["stage"] == name and "ratio_mean" in row]
    assert first["log_prob_difference_max"] < 1e-4 and first["reward_std_in_group"] > 0

  run, model = folder / "run", UAE.load(folder / "model", dtype="float32")
  trained = UAE.load(run, dtype="float32")
  # Only adapters have changed.
  for path in ("image_embedding", "vision/positions", "vq/codebook", "language/embedding"):
    ours, theirs = trained.params["captioner"], model.params["captioner"]
    for part in path.split("/"):
      ours, theirs = ours[part], theirs[part]
    np.testing.assert_array_equal(ours, theirs)
  adapter = trained.params["captioner"]["language"]["layers"]["mlp"]["up"]["lora_b"]
  assert np.abs(adapter).max() > 0

  picture = folder / "pictures" / "held_out" / "0.png"
  out = tmp_path / "reconstructed"
  assert cli.run(["reconstruct", f"--model={run}", f"--images={picture}", f"--out={out}", "--max-new-tokens=6"]) == 0
  assert Image.open(out / "recon_0.png").size == (SIDE, SIDE)


def test_one_step_trains_both_directions(folder):
  options = {f"{JOINT}.options.num_rollouts": 2, f"{JOINT}.options.images_per_caption": 2}
  assert train(folder, workdir="joint", stages=f"('{JOINT}',)", **options) == 0
  lines = (folder / "joint" / "metrics.jsonl").read_text().splitlines()
  (row,) = [row for row in map(json.loads, lines) if "ratio_mean" in row]
  assert max(row["log_prob_difference_max"], row["image_log_prob_difference_max"]) < 1e-4
  assert row["reward_std_in_group"] > 0 and row["image_reward_std_in_group"] > 0

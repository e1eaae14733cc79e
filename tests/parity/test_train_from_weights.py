"""A run that starts from the official folder, with its weights and embedders and user images, exported to PyTorch."""

import dataclasses
import json
from pathlib import Path
import runpy
import shutil

from encoder_reference import randomize
import numpy as np
from official_reference import write_official_folder
from PIL import Image
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

import uae_jax
from uae_jax import sharding, trees
from uae_jax.commands.convert import convert
from uae_jax.commands.train import train
from uae_jax.layers import lora
from uae_jax.options import read_config
from uae_jax.training import initial
from uae_jax.training.build import build

CONFIG = Path(__file__).parents[2] / "configs" / "scenes.py"
STAGE = "generation_for_understanding"
SIDE = 20  # not a multiple of the captioner's cell of 8, just as 512 is not a multiple of 28


@pytest.fixture(scope="module")
def official(tmp_path_factory):
  with torch.no_grad():
    return write_official_folder(tmp_path_factory.mktemp("uae")).folder


@pytest.fixture(scope="module")
def embedders(tmp_path_factory):
  """Folders of a CLIP and a DINOv2 in the published layout."""
  small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
  models = {
    "clip": CLIPModel(
      CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20},
        vision_config={**small, "intermediate_size": 24},
        projection_dim=12,
      )
    ),
    "dinov2": Dinov2Model(Dinov2Config(**small, mlp_ratio=2)),
  }
  folders = {name: str(tmp_path_factory.mktemp(name)) for name in models}
  for name, model in models.items():
    randomize(model).save_pretrained(folders[name])
    settings = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    with open(f"{folders[name]}/preprocessor_config.json", "w") as file:
      json.dump(settings, file)
  return folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """JSON lines files of photographs of various sizes, for training and held out."""
  folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
  for split in ("train", "held_out"):
    lines = []
    for i in range(4):
      name = f"{split}_{i}.png"
      Image.fromarray(rng.integers(0, 255, (24 + i, 40, 3), np.uint8)).save(folder / name)
      lines.append(json.dumps({"image": name, "caption": "large red circle"}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))
  return folder


def make_config(official, embedders, pictures):
  config = runpy.run_path(str(CONFIG))["get_config"]("smoke")
  config.model = "weights"
  config.init.weights = str(official)
  config.embedders.update(embedders)
  config.stages = (STAGE,)
  config.data.source, config.data.data_dir = "jsonl:{split}.jsonl", str(pictures)
  config.data.image_px, config.data.caption_tokens = SIDE, 6
  config[STAGE].options.update({"max_new_tokens": 6, "sampler_steps": 1})
  config[STAGE].update({"batch_size": 4, "total_steps": 1})
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  config.evaluation.update({"num_images": 3, "batch_size": 3, "max_new_tokens": 6, "sampler_steps": 1})
  return config


@pytest.fixture(scope="module")
def workdir(official, embedders, pictures, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "run"
  train(read_config(make_config(official, embedders, pictures)), workdir)
  return workdir


def test_only_adapters_of_the_captioner_moved(workdir, official):
  before = dict(trees.items(uae_jax.UAE.load(official, dtype="float32").params))
  after = dict(trees.items(uae_jax.UAE.load(workdir, dtype="float32").params))
  assert set(before) == set(after)
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  assert moved and all(path.startswith("captioner/") and lora.is_adapter(path) for path in moved)


def test_figures_of_held_out_pictures(workdir):
  figures = json.loads((workdir / "evaluation" / f"{STAGE}.json").read_text())
  assert -1 <= figures["reward_similarity"] <= 1 and -1 <= figures["held_out_similarity"] <= 1
  assert figures["true_caption_length"] == 3 and "caption_recall" not in figures
  assert (workdir / "report" / "index.html").exists()


def test_the_result_opens_as_an_official_folder(workdir, official, tmp_path):
  convert(workdir, tmp_path / "peft", "peft")
  shutil.copytree(official / "SD3", tmp_path / "peft" / "SD3", dirs_exist_ok=True)
  ours = dict(trees.items(uae_jax.UAE.load(workdir, dtype="float32").params))
  again = uae_jax.UAE.load(tmp_path / "peft", dtype="float32").params
  for path, leaf in trees.items(again):
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(ours[path]), err_msg=path)


def test_a_run_starts_from_another_run(workdir, official, embedders, pictures, tmp_path):
  config = read_config(make_config(official, embedders, pictures))
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  start = initial.read(config, mesh, tmp_path)
  built = build(config, start.sizes, start.processor, mesh)
  ours = dict(trees.items(uae_jax.UAE.load(workdir, dtype="float32").params))
  read = dict(trees.items(initial.read_checkpoint(f"{workdir}:{STAGE}", built.abstract_params)))
  for path, leaf in ours.items():
    np.testing.assert_array_equal(np.asarray(read[path]), np.asarray(leaf), err_msg=path)
  assert any(path.startswith("embedders/dinov2/") for path in read)
  with pytest.raises(ValueError, match="no finished stage there"):
    initial.read_checkpoint(f"{workdir}:pretrain", built.abstract_params)


def test_what_cannot_start_is_refused(official, embedders, pictures, tmp_path):
  config = make_config(official, embedders, pictures)
  config.embedders.clip = ""
  with pytest.raises(ValueError, match="set config.embedders.clip to the folder"):
    train(read_config(config), tmp_path / "a")
  config = make_config(official, embedders, pictures)
  config.embedders.clip = "fresh"
  with pytest.raises(ValueError, match="config.embedders.clip = 'fresh' is random numbers"):
    train(read_config(config), tmp_path / "b")
  config = make_config(official, embedders, pictures)
  config.model = "uae_3b_sd35_large"
  with pytest.raises(ValueError, match="captioner .* = .*, but .* has"):
    train(read_config(config), tmp_path / "c")
  config = make_config(tmp_path / "absent", embedders, pictures)
  with pytest.raises(ValueError, match="config.init.weights = .*absent.*no such folder"):
    train(read_config(config), tmp_path / "d")

"""A folder of Janus through the Python API equals transformers: processor, captions, answers, weights both ways."""

import json
from pathlib import Path
import shutil

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
from transformers import JanusForConditionalGeneration

from tests.janus_folder import GRID, SIDE, pictures, write_janus_folder
from uae_jax import cli
from uae_jax.api import UAE
from uae_jax.commands import convert
from uae_jax.data import processors
from uae_jax.weights.table import WeightError

QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp("janus") / "model"


@pytest.fixture(scope="module")
def theirs(folder):
  return write_janus_folder(folder)


@pytest.fixture(scope="module")
def ours(folder, theirs) -> UAE:
  return UAE.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
  return [Image.fromarray(picture) for picture in pictures()]


def chat(processor, question: str, image: Image.Image | None = None, **kwargs):
  content = [{"type": "image"}] if image else []
  messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
  text = processor.apply_chat_template(messages, add_generation_prompt=True)
  return processor(text=text, images=image, return_tensors="pt", **kwargs)


def test_images_and_prompts(folder, theirs, images):
  processor, other = processors.read(folder), theirs[1]
  for image in images:
    wanted = chat(other, QUESTION, image)
    found = np.asarray(processor.resize(image))
    assert found.shape == (SIDE, SIDE, 3)
    np.testing.assert_allclose(found / 127.5 - 1, wanted["pixel_values"][0].permute(1, 2, 0), atol=1e-6)
    assert processor.question_prompt((GRID, GRID), QUESTION) == wanted["input_ids"][0].tolist()
  wanted = chat(other, "a red circle", generation_mode="image")["input_ids"][0].tolist()
  assert processor.generation_prompt("a red circle") == wanted


def test_answers(ours, theirs, images):
  model, processor = theirs
  wanted = []
  for image in images:
    inputs = chat(processor, QUESTION, image)
    # Ours never samples control tokens.
    out = model.generate(**inputs, max_new_tokens=8, suppress_tokens=[0, *range(2, 9), *range(33, 48)])
    wanted.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
  found = ours.answer(images, [QUESTION] * 3, max_new_tokens=8, repetition_penalty=1.0)
  assert found == wanted and any(found)


def test_images_from_text(ours):
  texts = ["a red circle", "a small blue square on black , a cross left of it"]
  drawn = ours.generate(texts, seed=3, output="array")
  assert drawn.shape == (2, SIDE, SIDE, 3) and np.abs(drawn[0] - drawn[1]).max() > 0.05
  # An image depends on its text, seed and index alone.
  alone = ours.generate(texts[1:], seed=3, indices=[1], output="array")
  np.testing.assert_allclose(alone[0], drawn[1], atol=1e-4)
  assert np.abs(ours.generate(texts[:1], seed=4, output="array")[0] - drawn[0]).max() > 0.05
  captions, made = ours.reconstruct([Image.new("RGB", (SIDE, SIDE))], max_new_tokens=5)
  assert len(captions) == 1 and made[0].size == (SIDE, SIDE)


def test_options_of_diffusion_are_refused(ours):
  with pytest.raises(ValueError, match="steps = 20: this model generates images token by token"):
    ours.generate(["a"], steps=20)
  with pytest.raises(ValueError, match="guidance_interval"):
    ours.generate(["a"], guidance_interval=(0.1, 0.5))
  with pytest.raises(ValueError, match="48 x 48 px: the model makes images of 24 x 24"):
    ours.generate(["a"], height=48, width=48)
  with pytest.raises(ValueError, match="velocity: images of this model are tokens"):
    ours.velocity(jnp.zeros((1, 6, 6, 2)), jnp.zeros(1), jnp.zeros((1, 4, 48)))


def test_a_suite_of_images(folder, theirs, tmp_path):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a red circle\na small blue square\n")
  model, out = f"--model={folder}", tmp_path / "out"
  assert (
    cli.run(["evaluate", "--suite=diversity", model, f"--prompts={prompts}", f"--out={out}/images", "--samples=2"]) == 0
  )
  settings = json.loads((out / "images" / "results.json").read_text())["settings"]
  assert (settings["sampler"], settings["steps"], settings["shift"]) == ("tokens", GRID**2, 1.0)
  assert settings["negative_prompt"] == ""


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_weights_go_both_ways(folder, ours, theirs, tmp_path, to):
  target = tmp_path / "export"
  convert.convert(folder, target, to)
  again = UAE.load(target, dtype="float32")
  assert again.fingerprint() == ours.fingerprint() and again.inference == ours.inference
  if to == "huggingface":
    loaded = JanusForConditionalGeneration.from_pretrained(target)
    for name, value in theirs[0].state_dict().items():
      assert torch.equal(value, loaded.state_dict()[name]), name


def test_torch_archives_are_read(folder, ours, theirs, tmp_path):
  other = shutil.copytree(folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
  torch.save(theirs[0].state_dict(), other / "pytorch_model.bin")
  assert UAE.load(other, dtype="float32").fingerprint() == ours.fingerprint()


@pytest.mark.parametrize(
  "file, change, message",
  [
    ("config.json", {"image_token_id": 7}, "image_token_id is 7 in config.json and 4 in the processor's files"),
    ("config.json", {"vq_config.num_embeddings": 60}, "shape .50, 8. becomes .50, 8., vq/codebook wants .60, 8."),
    ("config.json", {"text_config.hidden_act": "gelu"}, "text_config.hidden_act is 'gelu', only 'silu'"),
    ("processor_config.json", {"image_processor.image_mean": [0.4, 0.4, 0.4]}, "image_mean is .* only"),
    ("processor_config.json", {"num_image_tokens": 35}, "35 tokens .num_image_tokens. do not fill an image of 24 x 24"),
  ],
)
def test_what_does_not_fit_is_named(folder, theirs, tmp_path, file, change, message):
  other = shutil.copytree(folder, tmp_path / "other")
  content = json.loads((other / file).read_text())
  for path, value in change.items():
    *sections, field = path.split(".")
    part = content
    for section in sections:
      part = part[section]
    part[field] = value
  (other / file).write_text(json.dumps(content))
  with pytest.raises((ValueError, WeightError), match=message):
    UAE.load(other, dtype="float32")

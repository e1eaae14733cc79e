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
from uae_jax.weights import sources
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
    ("processor_config.json", {"image_processor.rescale_factor": 1 / 127.5}, "rescale_factor is .* only"),
    ("processor_config.json", {"image_processor.image_mean": None}, "no image_mean; its default is that of CLIP"),
    ("processor_config.json", {"image_processor.size": {"shortest_edge": 24}}, "size is .* expected a square"),
    ("processor_config.json", {"image_processor.resample": [3]}, "resample is .3., which is no filter"),
    ("processor_config.json", {"use_default_system_prompt": True}, "use_default_system_prompt is True, only False"),
    ("config.json", {"vision_config.num_hidden_layers": 4_000_000}, "says 4000000 layers, the tensors have 2"),
    ("config.json", {"vision_config.depth": 4_000_000}, "vision_config.depth says 4000000 layers, the tensors have 2"),
    ("config.json", {"vq_config.num_res_blocks": 4_000_000}, "num_res_blocks says 4000000 layers, the tensors have 1"),
    (
      "config.json",
      {"vq_config.channel_multiplier": [1] * 999},
      "channel_multiplier says 999 layers",
    ),
    (
      "config.json",
      {"vq_config.channel_multiplier": ["a"]},
      "channel_multiplier is .* expected a list of",
    ),
    ("generation_config.json", {"guidance_scale": "5"}, "guidance_scale is '5', expected a number from 1"),
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


def test_adapters_beside_a_janus_are_refused(folder, theirs, tmp_path):
  other = shutil.copytree(folder, tmp_path / "other")
  (other / "adapter_config.json").write_text('{"peft_type": "LORA"}')
  with pytest.raises(WeightError, match="adapter_config.json: adapters beside a Janus are not read"):
    UAE.load(other, dtype="float32")


def test_images_have_the_guidance_of_the_folder(folder, ours, tmp_path, recwarn):
  other = shutil.copytree(folder, tmp_path / "other")
  file = other / "generation_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_scale": 2.5}))
  found = UAE.load(other, dtype="float32").inference
  assert (found.guidance, ours.inference.guidance) == (2.5, 5.0)
  assert not [warning for warning in recwarn if "guidance_scale" in str(warning.message)]


def test_a_stored_head_counts_where_it_differs_from_tied_embeddings(folder, theirs, tmp_path):
  other = shutil.copytree(folder, tmp_path / "other")
  file = other / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
  with pytest.warns(UserWarning, match="lm_head.weight differs from .*embed_tokens.weight: both are used"):
    found = sources.config(other)
  assert not found.captioner.language.ties_embeddings
  loaded = JanusForConditionalGeneration.from_pretrained(other)
  assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


@pytest.mark.parametrize(
  "index, message",
  [
    ({}, "no weight_map"),
    ({"weight_map": ["a"]}, "no weight_map"),
    ({"weight_map": {"a": [1]}}, "a shard is named .1."),
    ({"weight_map": {"a": "../b.bin"}}, "a shard is named '../b.bin'"),
    ({"weight_map": {"a": "b.bin"}}, "names files that are not there: b.bin"),
    ({"weight_map": {"lm_head.weight": "one.bin", "b": "two.bin"}}, "is in another file, too, or .* is stale"),
  ],
)
def test_indexes_of_torch_archives(folder, theirs, tmp_path, index, message):
  other = shutil.copytree(folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
  for name in ("one.bin", "two.bin"):
    torch.save({"lm_head.weight": torch.ones(2)}, other / name)
  (other / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match=message):
    sources.config(other)


def test_shards_of_torch_archives_are_read(folder, ours, theirs, tmp_path):
  other = shutil.copytree(folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
  names, state = list(theirs[0].state_dict()), theirs[0].state_dict()
  places = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(names)}
  for file in set(places.values()):
    torch.save({name: state[name] for name in names if places[name] == file}, other / file)
  (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
  assert UAE.load(other, dtype="float32").fingerprint() == ours.fingerprint()


def deepseek_processor(folder: Path) -> None:
  """Rewrites the image settings of a folder in the layout of DeepSeek."""
  settings = {
    "image_processor_type": "VLMImageProcessor",
    "processor_class": "VLChatProcessor",
    "image_size": SIDE,
    "min_size": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "background_color": [127] * 3,
  }
  (folder / "preprocessor_config.json").write_text(json.dumps(settings))
  whole = {"num_image_tokens": GRID**2, "sft_format": "deepseek", "image_tag": "<image_placeholder>"}
  (folder / "processor_config.json").write_text(json.dumps(whole | {"add_special_token": False, "ignore_id": -100}))


@pytest.mark.parametrize("size", [(50, 20), (31, 90), (24, 24), (37, 23), (1000, 3)])
def test_images_of_deepseeks_folders(folder, theirs, tmp_path, size):
  """Their code rounds sides down, transformers' to the nearest. Source: VLMImageProcessor.resize."""
  other = shutil.copytree(folder, tmp_path / "other")
  deepseek_processor(other)
  processor = processors.read(other)
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
  width, height = (max(int(length / max(size) * SIDE), 3) for length in size)
  square = Image.new("RGB", (max(width, height),) * 2, (127, 127, 127))
  place = (0, (width - height) // 2) if width > height else ((height - width) // 2, 0)
  square.paste(image.resize((width, height), Image.Resampling.BICUBIC), place)
  np.testing.assert_array_equal(processor.resize(image), square)


@pytest.mark.parametrize(
  "file, change, message",
  [
    ("preprocessor_config.json", {"image_size": None}, "image_size is None, expected a positive integer"),
    ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False, only True"),
    ("processor_config.json", {"sft_format": "plain"}, "sft_format is 'plain', only 'deepseek'"),
    ("processor_config.json", {"add_special_token": True}, "add_special_token is True, only False"),
  ],
)
def test_settings_of_deepseek_that_change_pixels_or_prompts(folder, theirs, tmp_path, file, change, message):
  other = shutil.copytree(folder, tmp_path / "other")
  deepseek_processor(other)
  (other / file).write_text(json.dumps(json.loads((other / file).read_text()) | change))
  with pytest.raises(ValueError, match=message):
    processors.read(other)


def test_prompts_of_deepseeks_folders(folder, theirs, tmp_path):
  """Questions about images begin with the system prompt of their code, prompts of images do not."""
  other = shutil.copytree(folder, tmp_path / "other")
  deepseek_processor(other)
  processor = processors.read(other)
  system = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
  )
  image = "<begin_of_image>" + "<image_placeholder>" * GRID**2 + "<end_of_image>"
  wanted = f"{system}\n\n<|User|>: {image}\n{QUESTION}\n\n<|Assistant|>:"
  assert processor.question_prompt((GRID, GRID), QUESTION) == processor.tokenizer.encode(wanted)
  wanted = "<|User|>: a red circle\n\n<|Assistant|>:<begin_of_image>"
  assert processor.generation_prompt(" a red circle\n") == processor.tokenizer.encode(wanted)

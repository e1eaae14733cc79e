"""Through the public API, the official folder of UAE gives PyTorch's results; invalid folders raise clear errors."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
from official_reference import DIT_FOLDER, QWEN_FOLDER, write_official_folder
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file
import torch

import uae_jax
from uae_jax import sharding, trees
from uae_jax.layers.quantized import Int8Weight
from uae_jax.models.qwen25_vl.vision import normalize, patchify
from uae_jax.weights.qwen25_vl import canonical
from uae_jax.weights.table import WeightError

ATOL = 2e-4
PROMPTS = ["red circle", "a small blue square above a green cross"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  with torch.no_grad():
    yield write_official_folder(tmp_path_factory.mktemp("uae"))


@pytest.fixture(scope="module")
def uae(reference):
  return uae_jax.UAE.load(reference.folder, dtype="float32")


@pytest.fixture(scope="module")
def picture():
  return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))


def close(ours, theirs):
  theirs = theirs.detach().numpy()
  np.testing.assert_allclose(np.asarray(ours), theirs, atol=ATOL * max(1.0, np.abs(theirs).max()), rtol=0)


def nchw(images):
  return torch.as_tensor(np.moveaxis(np.asarray(images), -1, 1).copy())


def test_contexts(uae, reference):
  context, mask = uae.encode_text(PROMPTS)
  close(context, reference.context(PROMPTS))
  assert mask.shape == context.shape[:2] and not mask[0].all() and mask[1].all()


def test_pooled_embedding_of_the_empty_prompt(uae, reference):
  ids = torch.tensor([[53, 54]])
  theirs = torch.cat([encoder(ids).text_embeds for encoder in reference.text_encoders], dim=-1)[0]
  close(uae.params["pooled"], theirs)


def test_velocity(uae, reference):
  rng = np.random.default_rng(1)
  latents = rng.normal(size=(2, 8, 6, 16)).astype(np.float32)
  context = rng.normal(size=(2, 5, 48)).astype(np.float32)
  pooled = rng.normal(size=(2, 32)).astype(np.float32)
  timesteps = np.asarray([20.0, 900.0], np.float32)
  theirs = reference.velocity(*map(torch.as_tensor, (nchw(latents), timesteps, context, pooled)))
  close(nchw(uae.velocity(latents, timesteps, context, pooled)), theirs)


def test_autoencoder(uae, reference):
  images = np.random.default_rng(2).uniform(-1, 1, (1, 16, 12, 3)).astype(np.float32)
  config = reference.vae.config
  latents = (reference.vae.encode(nchw(images)).latent_dist.mode() - config.shift_factor) * config.scaling_factor
  close(nchw(uae.encode_image(images)), latents)
  decoded = reference.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
  close(nchw(uae.decode_latents(np.moveaxis(latents.numpy(), 1, -1))), decoded)


def their_inputs(reference, uae, picture):
  """Question and image for the torch model, from our processor."""
  pixels = np.asarray(reference.processor.resize(picture))
  vision = reference.language.config.vision_config
  rows, columns = (side // vision.patch_size for side in pixels.shape[:2])
  ids = reference.processor.caption_prompt((rows, columns))
  config = uae._config.captioner.vision
  patches = patchify(normalize(pixels[None], config), config)[0]
  return ids, torch.as_tensor(np.array(patches)), torch.tensor([[1, rows, columns]])


def their_log_probs(reference, ids, patches, grid):
  tokens = torch.tensor([ids])
  is_image = (tokens == reference.processor.image_token_id).int()
  out = reference.language(
    input_ids=tokens, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=is_image, use_cache=False
  )
  return torch.log_softmax(out.logits[0].float(), dim=-1)


def test_log_probs_and_greedy_captions(uae, reference, picture):
  ids, patches, grid = their_inputs(reference, uae, picture)
  processor = reference.processor
  caption = "red circle above blue square"
  tokens = [*processor.encode(caption), processor.end_ids[0]]
  log_probs = their_log_probs(reference, ids + tokens, patches, grid)[len(ids) - 1 : -1]
  close(uae.log_probs([picture], [caption])[0], log_probs[torch.arange(len(tokens)), torch.tensor(tokens)])

  for penalty in (1.0, 1.3):
    row = list(ids)
    while len(row) < len(ids) + 6:
      scores = their_log_probs(reference, row, patches, grid)[-1].clone()
      seen = torch.tensor(sorted(set(row)))
      if penalty != 1.0:
        # The penalty is defined on logits, so it needs the model's logits in place of log-probabilities.
        out = reference.language(
          input_ids=torch.tensor([row]),
          pixel_values=patches,
          image_grid_thw=grid,
          mm_token_type_ids=(torch.tensor([row]) == processor.image_token_id).int(),
          use_cache=False,
        )
        scores = out.logits[0, -1].clone()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
      # Captions consist of text; with these random weights, other tokens would win now and then.
      scores[processor.vocab_size :] = -torch.inf
      scores[[token for token in processor.control_ids if token not in processor.end_ids]] = -torch.inf
      row.append(int(scores.argmax()))
      if row[-1] in processor.end_ids:
        break
    theirs = processor.decode([token for token in row[len(ids) :] if token not in processor.end_ids])
    ours = uae.caption([picture], max_new_tokens=6, temperature=0, repetition_penalty=penalty)
    assert ours == [theirs]


@pytest.fixture(scope="module")
def half(reference):
  return uae_jax.UAE.load(reference.folder, dtype="bfloat16")


def test_bfloat16_keeps_adapters_in_float32(half):
  for path, leaf in trees.items(half.params):
    is_exact = "lora_" in path or path == "pooled" or path.startswith("vae/latent_")
    assert leaf.dtype == ("float32" if is_exact else "bfloat16"), path


def in_bfloat16(module):
  """The model as PEFT loads it: base weights in bfloat16, adapters in float32."""
  module = copy.deepcopy(module).bfloat16()
  for name, parameter in module.named_parameters():
    if "lora_" in name:
      parameter.data = parameter.data.float()
  return module


def deviation(values, exact):
  """Root mean square of the difference."""
  return float(np.sqrt(np.mean((np.asarray(values, np.float32) - exact.numpy()) ** 2)))


@pytest.fixture(scope="module")
def their_half(reference):
  nets = ("language", "projector", "decoder", "vae")
  return dataclasses.replace(reference, **{net: in_bfloat16(getattr(reference, net)) for net in nets})


# In networks this narrow, deviations of one sample differ by up to a factor of three; over many the ratio is near 1.
MANY = 24


def test_bfloat16_contexts_deviate_no_more_than_in_pytorch(reference, their_half, half):
  colors, shapes = ("red", "green", "blue", "white"), ("circle", "square", "triangle", "cross")
  prompts = [f"large {color} {shape} above small {color} square" for color in colors for shape in shapes]
  exact = reference.context(prompts)
  allowed = deviation(their_half.context(prompts).float(), exact)
  assert deviation(half.encode_text(prompts)[0], exact) <= 1.5 * allowed


def test_bfloat16_images_deviate_no_more_than_in_pytorch(reference, their_half, half):
  rng = np.random.default_rng(3)
  latents, context = rng.normal(size=(MANY, 8, 6, 16)), rng.normal(size=(MANY, 24, 48))
  pooled, timesteps = rng.normal(size=(MANY, 32)), rng.uniform(0, 1000, size=MANY)
  inputs = [x.astype(np.float32) for x in (latents, timesteps, context, pooled)]
  tensors = [nchw(inputs[0]), *map(torch.as_tensor, inputs[1:])]
  exact = reference.velocity(*tensors)
  rounded = [tensors[0].bfloat16(), tensors[1], *(tensor.bfloat16() for tensor in tensors[2:])]
  allowed = deviation(their_half.velocity(*rounded).float(), exact)
  assert deviation(nchw(half.velocity(*inputs)), exact) <= 1.5 * allowed

  exact = reference.vae.decode(tensors[0]).sample
  allowed = deviation(their_half.vae.decode(tensors[0].bfloat16()).sample.float(), exact)
  config = reference.vae.config
  scaled = (inputs[0] - config.shift_factor) * config.scaling_factor
  assert deviation(nchw(half.decode_latents(scaled)), exact) <= 1.5 * allowed


def test_bfloat16_log_probs_deviate_no_more_than_in_pytorch(reference, their_half, uae, half):
  rng, processor = np.random.default_rng(4), reference.processor
  pictures = [Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)) for _ in range(MANY)]
  caption = "red circle above blue square ; small white cross"
  tokens = [*processor.encode(caption), processor.end_ids[0]]

  def of(nets, picture):
    ids, patches, grid = their_inputs(reference, uae, picture)
    log_probs = their_log_probs(nets, ids + tokens, patches, grid)[len(ids) - 1 : -1]
    return log_probs[torch.arange(len(tokens)), torch.tensor(tokens)]

  exact = torch.stack([of(reference, picture) for picture in pictures])
  allowed = deviation(torch.stack([of(their_half, picture) for picture in pictures]), exact)
  ours = np.stack(half.log_probs(pictures, [caption] * MANY))
  assert deviation(ours, exact) <= 1.5 * allowed


def test_results_do_not_depend_on_the_batch(uae):
  """Images of two grids and prompts of three lengths: alone, together, and as part of a larger job."""
  rng = np.random.default_rng(4)
  pictures = [Image.fromarray(rng.integers(0, 255, (40, 50 + 40 * (i % 2), 3), np.uint8)) for i in range(5)]
  options = dict(max_new_tokens=5, temperature=1.0, seed=3)
  alone = uae.caption(pictures, batch_size=1, **options)
  assert len(set(alone)) > 1
  assert uae.caption(pictures, batch_size=4, **options) == alone
  assert uae.caption(pictures[3:], indices=[3, 4], **options) == alone[3:]

  prompts = ["red", *PROMPTS, "green", "blue"]
  size = dict(steps=2, height=16, width=16, seed=3, output="array")
  single = uae.generate(prompts, batch_size=1, **size)
  np.testing.assert_allclose(uae.generate(prompts, batch_size=4, **size), single, atol=2e-5)
  np.testing.assert_allclose(uae.generate(prompts[3:], indices=[3, 4], **size), single[3:], atol=2e-5)
  assert np.abs(single[0] - single[3]).max() > 0.01


ASKING = (
  "{% for message in messages %}<|im_start|> {{ message['role'] }} {% for item in message['content'] %}"
  "{% if item['type'] == 'text' %}{{ item['text'] }} "
  "{% else %}<|vision_start|> <|image_pad|> <|vision_end|> {% endif %}"
  "{% endfor %}<|im_end|>{% if add_generation_prompt %} assistant{% endif %}{% endfor %}"
)
QUESTIONS = ["red circle", "a small blue square above a green cross", " ".join(["red circle above"] * 12)]


@pytest.fixture(scope="module")
def asked(uae):
  """The same UAE with a chat template that has the question of the user, as Qwen2.5-VL's has."""
  other = copy.copy(uae)
  other.processor = dataclasses.replace(uae.processor, chat_template=ASKING)
  other._programs, other._prompts_of_grid = {}, {}
  return other


def their_question(reference, uae, picture, question):
  """Inputs of the torch model, whose token ids come from the tokenizer of transformers."""
  _, patches, grid = their_inputs(reference, uae, picture)
  message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
  tokenizer, image = uae.processor.tokenizer, uae.processor.image_token_id
  text = tokenizer.apply_chat_template([message], chat_template=ASKING, add_generation_prompt=True, tokenize=False)
  cells = int(grid.prod()) // uae.processor.merge_size**2
  ids = [i for token in tokenizer.encode(text) for i in [token] * (cells if token == image else 1)]
  return ids, patches, grid


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_answers_are_those_of_generate(asked, uae, reference, picture, penalty):
  processor, theirs = asked.processor, []
  never = {*range(processor.vocab_size, reference.language.config.text_config.vocab_size), *processor.control_ids}
  for question in QUESTIONS:
    ids, patches, grid = their_question(reference, asked, picture, question)
    row = torch.tensor([ids])
    out = reference.language.generate(
      input_ids=row,
      attention_mask=torch.ones_like(row),
      pixel_values=patches,
      image_grid_thw=grid,
      mm_token_type_ids=(row == processor.image_token_id).int(),
      do_sample=False,
      max_new_tokens=6,
      repetition_penalty=penalty,
      eos_token_id=list(processor.end_ids),
      pad_token_id=processor.pad_id,
      suppress_tokens=sorted(never - set(processor.end_ids)),
    )
    theirs.append(processor.caption_text(out[0, len(ids) :].numpy()))
  options = dict(max_new_tokens=6, repetition_penalty=penalty)
  ours = asked.answer([picture] * 3, QUESTIONS, batch_size=4, **options)
  assert ours == theirs and len(set(theirs)) > 1
  assert uae.processor.ignores_questions and not processor.ignores_questions
  assert asked.answer([picture], QUESTIONS[1:2], batch_size=1, **options) == theirs[1:2]


def test_choices_have_the_log_probabilities_of_torch(asked, reference, picture):
  choices = [["red", "blue"], ["red circle", "green"], ["blue", "above"]]
  ours = asked.choice_log_probs([picture] * 3, QUESTIONS, choices)
  for question, row, found in zip(QUESTIONS, choices, ours, strict=True):
    ids, patches, grid = their_question(reference, asked, picture, question)
    for choice, value in zip(row, found, strict=True):
      tokens = asked.processor.encode(choice)
      log_probs = their_log_probs(reference, ids + tokens, patches, grid)[len(ids) - 1 : -1]
      close(value, log_probs[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


def test_questions_and_choices_must_fit_the_images(asked, picture):
  with pytest.raises(ValueError, match="1 images, but 2 questions"):
    asked.answer([picture], ["red", "blue"])
  with pytest.raises(ValueError, match="each with a token"):
    asked.choice_log_probs([picture], ["red"], [["red", ""]])


def test_weights_land_on_a_mesh(uae, reference):
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  placed = uae_jax.UAE.load(reference.folder, dtype="float32", mesh=mesh)
  for (path, ours), (_, theirs) in zip(trees.items(placed.params), trees.items(uae.params), strict=True):
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=path)
  kernel = placed.params["captioner"]["language"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  np.testing.assert_allclose(placed.encode_text(PROMPTS)[0], uae.encode_text(PROMPTS)[0], atol=1e-4)


def test_eight_bits_round_by_half_a_step_and_compute_what_they_say(uae, reference, picture):
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  small = uae_jax.UAE.load(reference.folder, dtype="float32", mesh=mesh, int8=True)
  rounded = dict(trees.items(uae.params))
  num_rounded = 0
  for path, ours in trees.items(small.params):
    if not isinstance(ours, Int8Weight):
      continue
    exact, num_rounded = np.asarray(rounded[path]), num_rounded + 1
    step = np.abs(exact).max(axis=-2, keepdims=True) / 127
    rounded[path] = np.asarray(ours.values, np.float32) * np.asarray(ours.scale)
    assert ours.values.dtype == np.int8 and ours.values.addressable_shards[0].data.size < exact.size
    assert np.all(np.abs(rounded[path] - exact) <= 0.5001 * step), path
  assert num_rounded > 20
  floats = copy.copy(uae)
  floats.params = trees.from_items(rounded.items())
  contexts = [np.asarray(net.encode_text(PROMPTS)[0]) for net in (small, floats, uae)]
  latents = np.random.default_rng(1).normal(size=(2, 4, 4, 16)).astype(np.float32)
  velocities = [np.asarray(net.velocity(latents, np.full(2, 500.0), contexts[1])) for net in (small, floats, uae)]
  for ours, theirs, exact in (contexts, velocities):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert 1e-4 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.05
  options = dict(max_new_tokens=5, temperature=0.0)
  assert small.caption([picture], **options) == floats.caption([picture], **options)


def test_all_problems_are_in_one_report(reference, tmp_path):
  folder = tmp_path / "torn"
  shutil.copytree(reference.folder, folder)
  shard = folder / "llm_lora" / "model-00001-of-00003.safetensors"
  tensors = load_file(shard)
  lost = next(name for name in tensors if "lora_A" in name)
  tensors.pop(lost)
  tensors["model.stray.weight"] = np.zeros(3, np.float32)
  save_file(tensors, shard)
  file = folder / DIT_FOLDER / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  tensors["proj_out.bias"] = np.zeros(7, np.float32)
  save_file(tensors, file)
  with pytest.raises(WeightError) as error:
    uae_jax.UAE.load(folder)
  text = str(error.value)
  # A shard without an index entry is found by its header, so the index may be incomplete.
  assert "missing model.layers." in text and "unexpected model.stray.weight" in text and "proj_out.bias" in text

  (folder / "SD3" / "vae" / "config.json").unlink()
  (folder / DIT_FOLDER / "config.json").write_text("{}")
  with pytest.raises(WeightError) as error:
    uae_jax.UAE.load(folder)
  assert len(error.value.problems) == 2 and "no field 'num_attention_heads'" in str(error.value)


def test_plain_folders(reference, tmp_path):
  """Published Qwen2.5-VL and SD3.5 folders: no adapters, no connector, the decoder inside the SD3 folder."""
  folder = tmp_path / "plain"
  shutil.copytree(reference.folder, folder, ignore=shutil.ignore_patterns("*_lora"))
  (folder / DIT_FOLDER).rename(folder / "SD3" / "transformer")
  for file in (folder / QWEN_FOLDER).glob("model-*.safetensors"):
    save_file({name: value for name, value in load_file(file).items() if "projector" not in name}, file)
  index = folder / QWEN_FOLDER / "model.safetensors.index.json"
  places = json.loads(index.read_text())["weight_map"]
  index.write_text(json.dumps({"weight_map": {n: f for n, f in places.items() if "projector" not in n}}))
  with pytest.warns(UserWarning, match="connector starts from random numbers"):
    uae = uae_jax.UAE.load(folder, dtype="float32")
  assert not any("lora" in path for path, _ in trees.items(uae.params))
  assert uae.encode_text(["red circle"])[0].shape[-1] == 48


def test_a_foreign_folder_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="neither a run of uae-jax"):
    uae_jax.UAE.load(tmp_path)


@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    ("visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
    ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("model.language_model.norm.weight", "model.norm.weight"),
    ("model.base_model.model.layers.1.mlp.up_proj.base_layer.weight", "model.layers.1.mlp.up_proj.weight"),
    ("model.base_model.model.language_model.norm.weight", "model.norm.weight"),
    ("model.base_model.model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
    ("model.base_model.model.layers.1.mlp.up_proj.lora_A.default.weight", "model.layers.1.mlp.up_proj.lora_A.weight"),
    ("base_model.model.model.language_model.norm.weight", "model.norm.weight"),
    ("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", "model.layers.1.mlp.up_proj.lora_B.weight"),
    ("base_model.model.layers.1.mlp.up_proj.lora_B.weight", "model.layers.1.mlp.up_proj.lora_B.weight"),
    ("projector.0.weight", "projector.0.weight"),
    ("lm_head.weight", "lm_head.weight"),
  ],
)
def test_names_of_all_writers(theirs, ours):
  assert canonical(theirs) == ours

"""The processor equals transformers': sizes, pixels and patches of any image, templated prompts, padding."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from uae_jax.data import chat_template, processor_files
from uae_jax.data.processing import NEGATIVE_PROMPT, QUESTION, Processor
from uae_jax.models.prompts import Prompts
from uae_jax.models.qwen25_vl.vision import VisionConfig, normalize, patchify
from uae_jax.small_world.processor import write_processor

# Formats a chat of text and images like Qwen2.5-VL's template.
QWEN_TEMPLATE = (
  "{%- if messages[0].role != 'system' -%}"
  "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
  "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
  "{%- for part in message.content -%}"
  "{{ part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
  "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
  "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def write_qwen(folder, **image_settings):
  """Writes a folder in the layout of Qwen2.5-VL, with a byte-level tokenizer of a few merges."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIAL))
  tokenizer.train_from_iterator([QUESTION, NEGATIVE_PROMPT], trainer)
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
  fast.save_pretrained(folder)
  (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_TEMPLATE}))
  settings = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 65536} | image_settings
  (folder / "preprocessor_config.json").write_text(json.dumps(settings))
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def processor(folder):
  return Processor.from_folder(folder)


def picture(height, width, seed=0):
  """Smooth colors plus noise: filter errors are visible in both."""
  rows, columns = np.mgrid[:height, :width]
  noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
  smooth = np.stack([rows * 255 / height, columns * 255 / width, 128 + 100 * np.sin(columns / 9)], axis=-1)
  return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def patches_of(processor, image):
  config = VisionConfig(
    depth=1,
    width=4,
    num_heads=1,
    mlp_width=4,
    out_width=4,
    patch_size=processor.patch_size,
    spatial_merge=processor.merge_size,
  )
  return np.asarray(patchify(normalize(np.asarray(image)[None], config), config))[0]


@pytest.mark.parametrize("size", [(100, 140), (56, 56), (10, 20), (700, 500), (300, 17), (42, 70), (2000, 31)])
def test_sizes_pixels_and_patches(processor, folder, size):
  image = picture(*size)
  want = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="np")
  out = processor.resize(image, demo_resize=False)
  assert [1, out.height // 14, out.width // 14] == want["image_grid_thw"][0].tolist()
  np.testing.assert_allclose(patches_of(processor, out), want["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("patch, merge", [(4, 2), (6, 3)])
def test_other_patches(tmp_path, patch, merge):
  write_qwen(tmp_path, patch_size=patch, merge_size=merge, max_pixels=4000, min_pixels=1000)
  processor = Processor.from_folder(tmp_path)
  for size in ((90, 40), (11, 13)):
    image = picture(*size)
    want = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[image], return_tensors="np")
    out = patches_of(processor, processor.resize(image, demo_resize=False))
    np.testing.assert_allclose(out, want["pixel_values"], atol=2e-6)


def test_the_demo_keeps_thin_images_one_cell_high(processor):
  """The client has no side of 0 cells; the image processor alone has, and scales such images up."""
  thin = picture(3, 100)
  assert processor.resize(thin).size == (8 * 14, 2 * 14)
  assert processor.resize(thin, demo_resize=False).size == (24 * 14, 2 * 14)


def test_the_demo_resizes_twice(processor, folder):
  """Above the limit, the first rounding changes the pixels and, here, the grid."""
  image = picture(389, 517)
  once, twice = processor.resize(image, demo_resize=False), processor.resize(image)
  assert (once.height // 14, once.width // 14) == (14, 20) and (twice.height // 14, twice.width // 14) == (16, 20)
  first = image.resize((504, 392), Image.Resampling.BICUBIC)
  want = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[first], return_tensors="np")
  np.testing.assert_allclose(patches_of(processor, twice), want["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_any_mode(processor, mode):
  image = picture(60, 80)
  if mode.startswith("I"):
    image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) * 257).astype("<u2"))
    image = image if mode == "I;16" else image.convert("I")
  else:
    image = image.convert(mode)
  out = processor.resize(image)
  assert out.mode == "RGB" and out.size == (84, 56)
  assert 60 < np.asarray(out).mean() < 200


def test_rotation_of_the_camera_is_undone(processor, tmp_path):
  image, exif = picture(60, 120), Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  image.save(tmp_path / "turned.png", exif=exif)
  out = processor.resize(tmp_path / "turned.png")
  assert out.size == (56, 112)
  np.testing.assert_array_equal(out, processor.resize(image.transpose(Image.Transpose.ROTATE_270)))


def test_a_broken_picture_is_named(processor, tmp_path):
  (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
  with pytest.raises(ValueError, match="torn.png"):
    processor.resize(tmp_path / "torn.png")
  with pytest.raises(ValueError, match="absent.jpg: no such file"):
    processor.resize(tmp_path / "absent.jpg")
  with pytest.raises(ValueError, match="narrower than"):
    processor.resize(Image.new("RGB", (1, 300)))


def test_caption_prompt(processor):
  text = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{QUESTION}<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
  )
  ids = processor.caption_prompt((4, 6))
  assert ids == processor.tokenizer.encode(text) and ids.count(processor.image_token_id) == 6
  with pytest.raises(ValueError, match="does not divide"):
    processor.caption_prompt((4, 5))


@pytest.mark.parametrize("cells", [(1, 1), (3, 5), (7, 2)])
def test_prompts_take_the_grid_of_an_image(processor, cells):
  """The prompts of a square, used for an image of another shape, are those that are rendered for it."""
  merge = processor.merge_size
  square = Prompts.from_processor(processor, (4 * merge, 4 * merge))
  own = Prompts.from_processor(processor, (cells[0] * merge, cells[1] * merge))
  found = square.for_image(cells, processor.image_token_id)
  assert found.image_grid == own.image_grid == cells
  np.testing.assert_array_equal(found.caption, own.caption)
  np.testing.assert_array_equal(found.generation_prefix, own.generation_prefix)


def test_generation_prompt(processor):
  text = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>generate\n{NEGATIVE_PROMPT}<|im_end|>\n<|im_start|>assistant\n"
  )
  assert processor.generation_prompt(processor.negative_prompt) == processor.tokenizer.encode(text)


def test_prompts_can_be_chosen(folder):
  processor = Processor.from_folder(folder, question="What is it?", negative_prompt="blur")
  assert "user\nWhat is it?<|vision_start|>" in processor.tokenizer.decode(processor.caption_prompt((2, 2)))
  assert processor.negative_prompt == "blur"


def test_text_survives(processor):
  text = 'A red cat, 3 boxes "EXIT" \u2014 caf\u00e9.\n'
  assert processor.decode(processor.encode(text)) == text
  ids = [*processor.encode(text), *processor.end_ids]
  assert processor.decode(np.asarray(ids)) == text and processor.end_ids == (2, 0)


def test_captions_are_closed_and_truncated(processor):
  text = "A red cat."
  ids = processor.encode(text)
  tokens, length = processor.caption_rows([text, "", text * 9], len(ids) + 2)
  assert tokens[:2].tolist() == [[*ids, 2, 0], [2] + [0] * (len(ids) + 1)]
  assert length.tolist() == [len(ids) + 1, 1, len(ids) + 2] and tokens.dtype == length.dtype == np.int32
  texts = [processor.caption_text(row) for row in tokens]
  # What follows the closing token does not count; a truncated caption has none.
  assert texts[:2] == [text, ""] and texts[2].startswith(text)
  assert processor.caption_text([*ids, 0, *ids]) == text


@pytest.mark.parametrize("text", ["a red cat, 3 boxes. ", "caf\u00e9\u2014", " ", "\n\n", "x", "\u65e5\u672c"])
def test_huge_captions_are_cut_before_they_are_tokenized(processor, text, monkeypatch):
  """The tokens that are used are those of the whole text."""
  whole = processor.encode(text * 5000)[:16]
  lengths, encode = [], Processor.encode
  monkeypatch.setattr(Processor, "encode", lambda self, text: lengths.append(len(text)) or encode(self, text))
  tokens, length = processor.caption_rows([text * 5000, text * 1000_000], 16)
  assert tokens[0, : len(whole)].tolist() == whole and max(lengths) <= 50_000
  if len(whole) == 16:
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_rows_are_padded_on_the_right(processor):
  tokens, mask = processor.pad_rows([[5, 6, 7], [8]])
  assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
  tokens, mask = processor.pad_rows([[5, 6, 7], []], length=4)
  assert tokens.tolist() == [[5, 6, 7, 0], [0] * 4] and mask.sum() == 3
  assert tokens.dtype == np.int32 and mask.dtype == bool
  with pytest.raises(ValueError, match="longer than 2"):
    processor.pad_rows([[5, 6, 7]], length=2)


@pytest.mark.parametrize("write", [write_qwen, write_processor])
def test_the_seam_word_marks_the_caption(write, tmp_path):
  write(tmp_path)
  processor = Processor.from_folder(tmp_path)
  row, word = processor.generation_prompt(processor.seam_word), processor.encode(processor.seam_word)
  assert len(word) == 1 and row.count(word[0]) == 1


def test_the_small_world_goes_the_same_way(tmp_path):
  write_processor(tmp_path)
  processor = Processor.from_folder(tmp_path)
  words = processor.tokenizer.convert_ids_to_tokens(processor.caption_prompt((4, 4)))
  image = ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
  assert words == ["<|im_start|>", "user", "describe", *image, "<|im_end|>", "assistant"]
  words = processor.tokenizer.convert_ids_to_tokens(processor.generation_prompt("red circle"))
  assert words == ["<|im_start|>", "generate", "red", "circle", "<|im_end|>"]
  assert processor.resize(picture(32, 32)).size == (32, 32)


@pytest.mark.parametrize(
  "break_it, message",
  [
    (lambda path: (path / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer"),
    (lambda path: (path / "chat_template.json").unlink(), "no chat template"),
  ],
)
def test_a_broken_folder_is_named(tmp_path, break_it, message):
  break_it(write_qwen(tmp_path))
  with pytest.raises((ValueError, OSError), match=f"{tmp_path.name}.*{message}"):
    Processor.from_folder(tmp_path)


def test_pixels_are_normalised_in_float32(processor):
  values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
  config = VisionConfig(depth=1, width=4, num_heads=1, mlp_width=4, out_width=4)
  out = normalize(values, config)
  want = (values / 255 - np.array(config.image_mean)) / np.array(config.image_std)
  assert out.dtype == np.float32 and isinstance(out, jax.Array)
  np.testing.assert_allclose(out, want, atol=1e-6)


# --- Special tokens are not text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_qwen, write_processor])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<|im_start|>", "<|vision_start|>"])
def test_a_special_token_in_a_text_is_text(write, token, tmp_path):
  write(tmp_path)
  processor = Processor.from_folder(tmp_path, question=f"what {token} now")
  special = processor.tokenizer.convert_tokens_to_ids(token)
  text = f"red{token} circle {token}"
  assert special not in processor.encode(text)
  tokens, length = processor.caption_rows([text], 64)
  closing = processor.end_ids[0]
  assert tokens[0, : length[0]].tolist() == [*processor.encode(text), closing]
  # The prompts have the special tokens of the template, and no more.
  for prompt, plain in (
    (processor.generation_prompt(text), processor.generation_prompt("red circle")),
    (processor.caption_prompt((4, 4)), Processor.from_folder(tmp_path, question="what now").caption_prompt((4, 4))),
  ):
    assert prompt.count(special) == plain.count(special)


@pytest.mark.parametrize(
  "text", ["", " A cat ", "\n\nA cat.\n", "caf\u00e9 \u2014 \U0001f600 <b>|im|</b> < | im_end | >", "a  b\tc"]
)
def test_ordinary_text_is_tokenized_as_by_transformers(processor, text):
  messages = [{"role": "generate", "content": [{"type": "text", "text": text}]}]
  ids = processor.tokenizer.apply_chat_template(
    messages, chat_template=QWEN_TEMPLATE, add_generation_prompt=True, return_dict=False
  )
  assert processor.generation_prompt(text) == list(ids)
  assert processor.encode(text) == processor.tokenizer.encode(text, add_special_tokens=False)


# --- Folders of others ------------------------------------------------------------------------------------------------


def test_a_processor_saved_by_transformers_5(folder, processor, tmp_path):
  processor.tokenizer.save_pretrained(tmp_path)
  (tmp_path / "chat_template.jinja").write_text(QWEN_TEMPLATE)
  settings = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 3136, "longest_edge": 65536}}
  settings |= {"image_processor_type": "Qwen2VLImageProcessor", "do_resize": True, "rescale_factor": 1 / 255}
  whole = {"image_processor": settings, "processor_class": "Qwen2_5_VLProcessor"}
  (tmp_path / "processor_config.json").write_text(json.dumps(whole))
  new = Processor.from_folder(tmp_path)
  assert new.caption_prompt((16, 20)) == processor.caption_prompt((16, 20))
  assert new.resize(picture(389, 517)).size == processor.resize(picture(389, 517)).size
  file, changed = processor_files.replace_image_settings(tmp_path, {"image_mean": [0.5] * 3})
  assert file.name == "processor_config.json" and changed["image_processor"]["image_mean"] == [0.5] * 3


def test_code_of_a_folder_is_never_run_and_nothing_is_asked(tmp_path, monkeypatch, capsys):
  write_qwen(tmp_path)
  trap = tmp_path / "trap"
  (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass C: pass\n")
  auto_map = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
  monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
  Processor.from_folder(tmp_path)
  file = tmp_path / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map, "tokenizer_class": "EvilTokenizer"}))
  with pytest.raises(ValueError, match=f"{tmp_path.name}: the tokenizer cannot be read: .*code of their own"):
    Processor.from_folder(tmp_path)
  assert not trap.exists() and not capsys.readouterr().out


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LOOPS = "{%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}"


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (QWEN_TEMPLATE.replace(IMAGE, ""), "writes 0 times"),
    (QWEN_TEMPLATE.replace(IMAGE, 2 * IMAGE), "writes 2 times"),
    (QWEN_TEMPLATE + "<|image_pad|>", "writes 2 times"),
    (QWEN_TEMPLATE.replace("part.text if", "part.text|trim if"), "changes the text"),
    (QWEN_TEMPLATE.replace("part.text if", "'' if"), "does not write it once"),
    (QWEN_TEMPLATE + LOOPS, "takes more than"),
    (QWEN_TEMPLATE + "{{ 'a' * 10**10 }}", "takes more than"),
    (QWEN_TEMPLATE + "{{ 'a' * 10**7 }}", "writes more than"),
    (QWEN_TEMPLATE + "{% for", "TemplateSyntaxError"),
    (QWEN_TEMPLATE + "{{ raise_exception('no such role') }}", "no such role"),
    (QWEN_TEMPLATE + "{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("", "no chat template"),
    (["a"], "expected a text"),
  ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(folder, tmp_path, monkeypatch, template, message):
  monkeypatch.setattr(chat_template, "CPU_SECONDS", 2)
  broken = shutil.copytree(folder, tmp_path / "broken")
  (broken / "chat_template.json").write_text(json.dumps({"chat_template": template}))
  with pytest.raises(ValueError, match=rf"broken.*{message}"):
    Processor.from_folder(broken)


def test_a_tokenizer_that_fails_only_when_used_is_named(folder, tmp_path):
  broken = shutil.copytree(folder, tmp_path / "broken")
  file = broken / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "many"}))
  with pytest.raises(ValueError, match="broken: the tokenizer cannot be used"):
    Processor.from_folder(broken)


@pytest.mark.parametrize(
  ("content", "penalty"), [({"repetition_penalty": 1.3}, 1.3), ({"repetition_penalty": None}, 1.0), ({}, 1.0)]
)
def test_the_repetition_penalty_is_that_of_the_folder(tmp_path, content, penalty):
  (tmp_path / "generation_config.json").write_text(json.dumps(content))
  assert processor_files.repetition_penalty(tmp_path) == penalty


@pytest.mark.parametrize(
  ("content", "kept"),
  [
    ({}, (50, 1.0, 0.0)),
    ({"top_k": None}, (0, 1.0, 0.0)),
    ({"top_k": 0, "top_p": 1, "min_p": None}, (0, 1.0, 0.0)),
    ({"top_k": 20, "top_p": 0.8, "min_p": 0.05}, (20, 0.8, 0.05)),
  ],
)
def test_the_tokens_that_are_kept_are_those_of_the_folder(tmp_path, content, kept):
  """Without a word of the file, transformers keeps 50."""
  (tmp_path / "generation_config.json").write_text(json.dumps(content))
  assert processor_files.kept_tokens(tmp_path) == dict(zip(("top_k", "top_p", "min_p"), kept, strict=True))


@pytest.mark.parametrize("content", [{"top_k": -1}, {"top_k": 2.5}, {"top_p": 2}, {"min_p": "a"}])
def test_tokens_to_keep_out_of_range_are_refused(tmp_path, content):
  (tmp_path / "generation_config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match=rf"generation_config\.json: {next(iter(content))} = "):
    processor_files.kept_tokens(tmp_path)


def test_settings_of_sampling_that_are_not_applied_are_named(tmp_path):
  settings = {"typical_p": 0.5, "num_beams": 4, "top_k": 1, "top_p": 0.5, "temperature": 0.1}
  (tmp_path / "generation_config.json").write_text(json.dumps(settings))
  with pytest.warns(UserWarning, match=r"generation_config\.json: not applied to captions: typical_p, num_beams$"):
    processor_files.repetition_penalty(tmp_path)

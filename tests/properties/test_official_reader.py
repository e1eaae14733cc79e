"""Folders of others are understood or refused: every field that changes the result, with its file, in one report."""

import json
from pathlib import Path
import shutil
import time

import numpy as np
import pytest

from tests.official_folder import ALPHA, RANK, change_json, write_official_folder
from uae_jax.weights import tensor_files
from uae_jax.weights.official import Folders, Reader

pytestmark = pytest.mark.fast

DIT_LORA, LLM_LORA = "dit_lora/adapter_config.json", "llm_lora/adapter_config.json"
LANGUAGE, DECODER, VAE = "llm_model/config.json", "dit/config.json", "SD3/vae/config.json"
SCHEDULER, GENERATION = "SD3/scheduler/scheduler_config.json", "llm_model/generation_config.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return write_official_folder(tmp_path_factory.mktemp("weights") / "uae")


@pytest.fixture
def folder(source, tmp_path):
  return Path(shutil.copytree(source, tmp_path / "uae"))


def read(folder: Path) -> Reader:
  """A reader that has looked at everything but the values of the tensors."""
  reader = Reader(Folders(folder))
  if reader._uae is not None:
    reader.parts()
    reader.inference()
  return reader


def adapters_of(folder: Path) -> dict:
  return dict(tensor_files.open_folder(folder, "adapter_model"))


def write_adapters(folder: Path, tensors: dict, name: str = "adapter_model.safetensors") -> None:
  tensor_files.write(folder / name, tensors)


def test_a_whole_folder_has_no_problems(folder):
  reader = read(folder)
  assert not reader.problems
  assert reader.config.decoder_lora.alpha == reader.config.captioner_lora.alpha == ALPHA
  assert reader.config.decoder_lora.rank == RANK


# --- Fields of configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("file", "changes"),
  [
    (LANGUAGE, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    (LANGUAGE, {"hidden_act": "gelu"}),
    (LANGUAGE, {"use_sliding_window": True}),
    (LANGUAGE, {"layer_types": ["sliding_attention", "full_attention"]}),
    (LANGUAGE, {"quantization_config": {"load_in_4bit": True}}),
    (LANGUAGE, {"head_dim": 64}),
    (LANGUAGE, {"partial_rotary_factor": 0.5}),
    (LANGUAGE, {"model_type": "qwen2_vl"}),
    (LANGUAGE, {"num_attention_heads": 0}),
    (LANGUAGE, {"hidden_size": "2048"}),
    (DECODER, {"qk_norm": "layer_norm"}),
    (DECODER, {"_class_name": "FluxTransformer2DModel"}),
    (DECODER, {"dual_attention_layers": [7]}),
    (DECODER, {"quantization_config": {}}),
    (VAE, {"latents_mean": [0.0] * 16}),
    (VAE, {"act_fn": "relu"}),
    (VAE, {"scaling_factor": 0}),
    (VAE, {"norm_num_groups": 3}),
    (VAE, {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}),
    (VAE, {"use_quant_conv": True}),
    (SCHEDULER, {"use_dynamic_shifting": True}),
    (SCHEDULER, {"shift": -1}),
    (SCHEDULER, {"use_karras_sigmas": True}),
    (SCHEDULER, {"_class_name": "DDIMScheduler"}),
    (GENERATION, {"repetition_penalty": "1.05"}),
    (GENERATION, {"repetition_penalty": -1}),
    ("llm_model/preprocessor_config.json", {"image_std": [0.5, 0.5, 0]}),
    ("llm_model/preprocessor_config.json", {"do_normalize": False}),
    ("llm_model/preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}),
  ],
)
def test_a_field_that_is_not_supported_is_named_with_its_file(folder, file, changes):
  change_json(folder / file, **changes)
  name = next(iter(changes)).replace("rope_scaling", "rope type")
  assert any(str(folder / file) in problem and name in problem for problem in read(folder).problems)


def test_unknown_fields_are_named_in_a_warning(folder):
  change_json(folder / LANGUAGE, projector_kind="mlp2x_gelu", vision_config={"frobnicate": 3} | _vision(folder))
  with pytest.warns(UserWarning, match=r"config\.json: fields that are not known were ignored: projector_kind, vision"):
    assert not read(folder).problems


def _vision(folder):
  return json.loads((folder / LANGUAGE).read_text())["vision_config"]


def test_an_absent_shift_is_that_of_the_scheduler_class(folder):
  change_json(folder / SCHEDULER, shift=None)
  assert read(folder).inference().shift == 1.0
  (folder / SCHEDULER).unlink()
  assert read(folder).inference().shift == 3.0


@pytest.mark.parametrize(
  ("file", "changes", "message"),
  [
    (LANGUAGE, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    (LANGUAGE, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, the tensors have 2 layers"),
    (LANGUAGE, {"vocab_size": 10**12}, "vocab_size"),
    (DECODER, {"num_layers": 10**6}, "num_layers is 1000000, the tensors have 3 blocks"),
    (DECODER, {"pos_embed_max_size": 10**6}, "pos_embed_max_size"),
    (VAE, {"layers_per_block": 10**6}, "layers_per_block gives 1000000"),
    (VAE, {"block_out_channels": [4] * 10**5, "down_block_types": None, "up_block_types": None}, "block_out_channels"),
  ],
)
def test_sizes_are_compared_with_the_files_before_they_are_expanded(folder, file, changes, message):
  change_json(folder / file, **changes)
  start = time.process_time()
  assert any(message in problem for problem in read(folder).problems)
  assert time.process_time() - start < 10


@pytest.mark.parametrize("name", [LANGUAGE, DECODER, VAE, SCHEDULER, GENERATION, DIT_LORA, LLM_LORA, "uae.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a":' * 10**5, "\xff"])
def test_a_damaged_file_is_named(folder, name, content):
  (folder / name).write_bytes(content.encode("latin-1"))
  assert any(str(folder / name) in problem for problem in read(folder).problems)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"guidance": -3}, "uae.json.guidance = -3.0: expected more than 0"),
    ({"steps": 0}, "uae.json.steps = 0: expected 1 or more"),
    ({"text_tower": "none"}, "uae.json.text_tower = 'none': expected one of 'policy', 'reference'"),
    ({"guidence": 3.0}, "uae.json has no field 'guidence': did you mean 'guidance'?"),
  ],
)
def test_settings_of_an_export_are_checked(folder, changes, message):
  file = folder / "uae.json"
  file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
  assert any(message in problem for problem in read(folder).problems)


# --- Heads and ids ----------------------------------------------------------------------------------------------------


def add_to_language(folder, **tensors):
  path = folder / "llm_model"
  tensor_files.write(path / "model.safetensors", dict(tensor_files.open_folder(path)) | tensors)


def test_a_stored_head_counts_where_it_differs_from_tied_embeddings(folder):
  table = tensor_files.open_folder(folder / "llm_model")["model.embed_tokens.weight"]
  add_to_language(folder, **{"lm_head.weight": table})
  assert read(folder).config.captioner.language.ties_embeddings
  add_to_language(folder, **{"lm_head.weight": 2 * table})
  with pytest.warns(UserWarning, match="both are used"):
    reader = read(folder)
  assert not reader.problems and not reader.config.captioner.language.ties_embeddings
  assert any(row.theirs == "lm_head.weight" for part in reader.parts() for row in part.table)


def test_ids_beyond_the_embedding_table_are_refused(folder):
  change_json(folder / GENERATION, eos_token_id=[3, 10**6])
  change_json(folder / LANGUAGE, image_token_id=1)
  problems = "\n".join(read(folder).problems)
  assert (
    "eos_token_id is 1000000, the embedding table has" in problems and "image_token_id is 1 in config.json" in problems
  )


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [DIT_LORA, LLM_LORA])
@pytest.mark.parametrize(
  "changes",
  [
    *({"init_lora_weights": value} for value in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga")),
    {"use_dora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"rank_pattern": {"to_q": 4}},
    {"alpha_pattern": {"to_q": 4}},
    {"modules_to_save": ["proj_out"]},
    {"layers_to_transform": [0]},
    {"layer_replication": [[0, 2]]},
    {"trainable_token_indices": [1]},
    {"target_parameters": ["a"]},
    {"use_qalora": True},
    {"alora_invocation_tokens": [1]},
    {"kasa_config": {"a": 1}},
    {"an_option_of_tomorrow": True},
    {"target_modules": ["to_nothing"]},
    {"peft_type": "LOHA"},
    {"r": 7},
    {"lora_alpha": "16"},
  ],
)
def test_an_option_of_peft_that_changes_the_result_is_refused_by_name(folder, file, changes):
  change_json(folder / file, **changes)
  name = next(iter(changes)).replace("lora_alpha", "lora_alpha is '16'")
  assert any(str(folder / file) in problem and name in problem for problem in read(folder).problems)


@pytest.mark.parametrize(
  ("changes", "alpha"),
  [
    ({"lora_alpha": None}, 8),
    ({"use_rslora": True}, ALPHA * RANK**0.5),
    ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "peft_version": "0.21.2"}, ALPHA),
  ],
)
def test_the_scale_is_that_of_peft(folder, changes, alpha):
  for file in (DIT_LORA, LLM_LORA):
    change_json(folder / file, **changes)
  reader = read(folder)
  assert not reader.problems
  assert reader.config.decoder_lora.alpha == reader.config.captioner_lora.alpha == pytest.approx(alpha)


KOHYA = (("lora_A", "lora_down"), ("lora_B", "lora_up"))


def kohya(name: str) -> str:
  module, suffix = name.removeprefix("base_model.model.").split(".lora_")
  return f"lora_transformer_{module.replace('.', '_')}.lora_{suffix}".replace("lora_A", "lora_down").replace(
    "lora_B", "lora_up"
  )


@pytest.mark.parametrize(
  "rename",
  [
    lambda name: name.replace("base_model.model.", "transformer."),
    lambda name: name.replace("base_model.model.", ""),
    lambda name: name.replace("base_model.model.", "base_model.model.transformer."),
    lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    lambda name: name.replace(".weight", ".mine.weight"),
    lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    kohya,
  ],
)
def test_adapters_of_the_decoder_in_the_names_of_other_tools(folder, rename):
  tensors = adapters_of(folder / "dit_lora")
  write_adapters(folder / "dit_lora", {rename(name): value for name, value in tensors.items()})
  reader = read(folder)
  assert not reader.problems and reader.decoder_adapters.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(reader.decoder_adapters[name], value)


def test_fused_adapters_of_the_original_code_are_split(folder):
  shutil.rmtree(folder / "dit_lora")
  (folder / "dit_lora").mkdir()
  rng = np.random.default_rng(0)
  fused = {}
  for block in range(3):
    module = f"lora_unet_joint_blocks_{block}_x_block_attn_qkv"
    fused |= {
      f"{module}.lora_down.weight": rng.normal(size=(2, 8)).astype(np.float32),
      f"{module}.lora_up.weight": rng.normal(size=(24, 2)).astype(np.float32),
      f"{module}.alpha": np.float32(1),
    }
  write_adapters(folder / "dit_lora", fused, "anything.safetensors")
  reader = read(folder)
  assert not reader.problems and reader.config.decoder_lora.alpha == 1
  for i, name in enumerate("qkv"):
    ours = reader.decoder_adapters[f"base_model.model.transformer_blocks.1.attn.to_{name}.lora_B.weight"]
    np.testing.assert_array_equal(
      ours, fused["lora_unet_joint_blocks_1_x_block_attn_qkv.lora_up.weight"][8 * i : 8 * i + 8]
    )


def test_the_scale_of_adapters_without_a_config(folder):
  tensors = adapters_of(folder / "dit_lora")
  (folder / DIT_LORA).unlink()
  assert any("adapters' scale is not known" in problem for problem in read(folder).problems)
  (folder / "dit_lora" / "adapter_model.safetensors").rename(folder / "dit_lora" / "pytorch_lora_weights.safetensors")
  assert read(folder).config.decoder_lora.alpha == RANK
  alphas = {name.replace(".lora_A.weight", ".alpha"): np.float32(5) for name in tensors if "lora_A" in name}
  write_adapters(folder / "dit_lora", tensors | alphas)
  assert read(folder).config.decoder_lora.alpha == 5
  alphas[next(iter(alphas))] = np.float32(3)
  write_adapters(folder / "dit_lora", tensors | alphas)
  assert any("different alpha" in problem for problem in read(folder).problems)


def test_two_sets_of_adapters_in_one_file_are_refused(folder):
  tensors = adapters_of(folder / "dit_lora")
  write_adapters(folder / "dit_lora", tensors | {n.replace(".weight", ".b.weight"): v for n, v in tensors.items()})
  assert any("several sets of adapters" in problem for problem in read(folder).problems)

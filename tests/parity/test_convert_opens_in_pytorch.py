"""The output of `uae-jax convert` opens in PyTorch with the same values, and loads again bit for bit."""

import shutil

from diffusers import AutoencoderKL, SD3Transformer2DModel
import jax
import numpy as np
from official_reference import DIT_FOLDER, QWEN_FOLDER, VAE_FOLDER, write_official_folder
from peft import PeftModel
import pytest
from safetensors.torch import load_file
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import uae_jax
from uae_jax import cli, sharding, trees
from uae_jax.commands.convert import convert

ATOL = 2e-4
PROMPTS = ["red circle", "a small blue square above a green cross"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  with torch.no_grad():
    yield write_official_folder(tmp_path_factory.mktemp("uae"))


@pytest.fixture(scope="module")
def exports(reference):
  """Target format -> exported folder."""
  folders = {to: reference.folder.parent / f"export_{to}" for to in ("orbax", "peft", "huggingface")}
  for to, folder in folders.items():
    convert(reference.folder, folder, to)
  return folders


def load_strictly(cls, folder, **kwargs):
  model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
  unexpected = [name for name in info["unexpected_keys"] if not name.startswith("projector.")]
  assert not info["missing_keys"] and not unexpected and not info["mismatched_keys"], info
  return model.eval()


def read_projector(folder):
  tensors = {}
  for file in folder.glob("model*.safetensors"):
    tensors |= {name: value for name, value in load_file(file).items() if name.startswith("projector.")}
  (hidden, width), out = tensors["projector.0.weight"].shape, tensors["projector.2.weight"].shape[0]
  module = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, out))
  module.load_state_dict({name.removeprefix("projector."): value for name, value in tensors.items()})
  return module


def assert_same_numbers(reference, language, decoder, vae, projector, atol):
  """Compares the exported models with those from which the official folder was written."""

  class Exported(type(reference)):
    pass

  mine = Exported(reference.folder, reference.processor, language, projector, decoder, vae, [])
  with torch.no_grad():
    torch.testing.assert_close(mine.context(PROMPTS), reference.context(PROMPTS), atol=atol, rtol=atol)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((2, 16, 8, 6), (2,), (2, 5, 48), (2, 32))]
    inputs[1] = torch.tensor([20.0, 900.0])
    torch.testing.assert_close(mine.velocity(*inputs), reference.velocity(*inputs), atol=atol, rtol=atol)
  for name, tensor in reference.vae.state_dict().items():
    assert torch.equal(tensor, vae.state_dict()[name]), name
  assert vae.config.scaling_factor == reference.vae.config.scaling_factor


def test_merged_folders_open_in_transformers_and_diffusers(reference, exports):
  folder = exports["huggingface"]
  assert_same_numbers(
    reference,
    load_strictly(Qwen2_5_VLForConditionalGeneration, folder / QWEN_FOLDER),
    load_strictly(SD3Transformer2DModel, folder / DIT_FOLDER),
    load_strictly(AutoencoderKL, folder / VAE_FOLDER),
    read_projector(folder / QWEN_FOLDER),
    ATOL,
  )


def test_adapters_open_in_peft(reference, exports):
  folder = exports["peft"]
  language = load_strictly(Qwen2_5_VLForConditionalGeneration, folder / QWEN_FOLDER)
  decoder = load_strictly(SD3Transformer2DModel, folder / DIT_FOLDER)
  adapted = PeftModel.from_pretrained(language, str(folder / "llm_lora")).eval()
  assert_same_numbers(
    reference,
    adapted,
    PeftModel.from_pretrained(decoder, str(folder / "dit_lora")).eval(),
    load_strictly(AutoencoderKL, folder / VAE_FOLDER),
    read_projector(folder / QWEN_FOLDER),
    1e-6,
  )
  names = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
  assert len(names) == 2 * 7, "the language model's linear layers and no others"


@pytest.mark.parametrize("to", ["orbax", "peft"])
def test_round_trips_are_bit_exact(reference, exports, to):
  before = uae_jax.UAE.load(reference.folder, dtype="auto")
  after = uae_jax.UAE.load(exports[to], dtype="auto")
  assert dict(trees.items(before.params)).keys() == dict(trees.items(after.params)).keys()
  for (path, old), (_, new) in zip(sorted(trees.items(before.params)), sorted(trees.items(after.params)), strict=True):
    assert old.dtype == new.dtype, path
    np.testing.assert_array_equal(np.asarray(old), np.asarray(new), err_msg=path)
  assert vars(before).keys() == vars(after).keys()
  assert before.inference == after.inference
  assert before._config == after._config


def test_adapters_alone_belong_beside_any_base(reference, exports, tmp_path):
  """Uses the names of transformers 4.50; the connector is included."""
  folder = tmp_path / "adapters"
  convert(reference.folder, folder, "peft", adapters_only=True, names="official")
  assert sorted(path.name for path in folder.iterdir()) == ["dit_lora", "llm_lora", "projector.safetensors"]
  for name in (QWEN_FOLDER, DIT_FOLDER, "SD3"):
    shutil.copytree(reference.folder / name, folder / name)
  before, after = (uae_jax.UAE.load(source, dtype="auto").params for source in (reference.folder, folder))
  for (path, old), (_, new) in zip(sorted(trees.items(before)), sorted(trees.items(after)), strict=True):
    # The only base weight that the full state changed is not part of an adapter.
    if path != "captioner/vision/merger/down/bias":
      np.testing.assert_array_equal(np.asarray(old), np.asarray(new), err_msg=path)


def test_merged_weights_paint_the_same(reference, exports):
  images = [
    uae_jax.UAE.load(folder, dtype="float32").generate(PROMPTS[:1], steps=2, height=8, width=8, output="array")
    for folder in (reference.folder, exports["huggingface"])
  ]
  np.testing.assert_allclose(*images, atol=1e-4)


def test_orbax_restores_onto_any_mesh(exports):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  uae = uae_jax.UAE.load(exports["orbax"], dtype="bfloat16", mesh=mesh)
  kernel = uae.params["captioner"]["language"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.dtype == "bfloat16" and kernel.addressable_shards[0].data.size == kernel.size // 4
  assert len(kernel.sharding.device_set) == len(jax.devices())


def test_nothing_is_overwritten(reference, tmp_path, capsys):
  target = tmp_path / "taken"
  target.mkdir()
  (target / "mine.txt").write_text("keep")
  assert cli.main(["convert", "--source", str(reference.folder), "--target", str(target), "--to", "peft"]) == 1
  assert "nothing is overwritten" in capsys.readouterr().err
  assert [file.name for file in target.iterdir()] == ["mine.txt"]


def test_a_failed_conversion_leaves_nothing(tmp_path, capsys):
  source = tmp_path / "source"
  source.mkdir()
  assert cli.main(["convert", "--source", str(source), "--target", str(tmp_path / "out"), "--to", "orbax"]) == 1
  assert [file.name for file in tmp_path.iterdir()] == ["source"]

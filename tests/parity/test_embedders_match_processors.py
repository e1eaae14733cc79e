"""Embedders equal the libraries' image processors and models, from files of any size and mode to unit-norm vectors."""

import json

from encoder_reference import randomize
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, Dinov2Config, DINOv3ViTConfig
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

from uae_jax import embedders
from uae_jax.data.images import read_image
from uae_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, Preprocessing
from uae_jax.embedders import clip, dinov2, dinov3, longclip

CLIP = {"CLIPImageProcessor": clip.PROCESSOR}
BIT = {"BitImageProcessor": dinov2.PROCESSOR}
DINOV3 = {"DINOv3ViTImageProcessor": dinov3.PROCESSOR}

SIZES = [(64, 48), (47, 93), (200, 31), (33, 33), (9, 14), (1, 5)]


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 4), dtype=np.uint8)
  return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(pixels, "RGBA")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", [
  {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
  {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}},
  {"size": {"shortest_edge": 20}, "crop_size": {"height": 24, "width": 27}},
  {"size": {"height": 30, "width": 20}, "do_center_crop": False, "resample": 2},
], ids=str)  # fmt: skip
def test_preprocessing_equals_the_processors(size, settings):
  image = picture(*size)
  for processor, defaults in ((CLIPImageProcessorPil, CLIP), (BitImageProcessorPil, BIT)):
    want = processor(**settings)(images=image, return_tensors="np")["pixel_values"][0]
    ours = Preprocessing.from_huggingface(settings, defaults)(image)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), want, atol=2e-6)


def test_defaults_and_old_spellings_equal_the_processors():
  image = picture(300, 250)
  for settings in ({}, {"size": 96, "crop_size": 80, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}):
    want = CLIPImageProcessorPil(**settings)(images=image, return_tensors="np")["pixel_values"][0]
    ours = Preprocessing.from_huggingface(settings, CLIP)(image)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), want, atol=2e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_the_same_rgb(mode):
  image = picture(40, 30, mode)
  want = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)(images=image, return_tensors="np")
  ours = Preprocessing(24, (24, 24))(image)
  np.testing.assert_allclose(ours.transpose(2, 0, 1), want["pixel_values"][0], atol=2e-6)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
  values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
  Image.fromarray(values).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], values // 257)


def test_exif_turns_the_picture(tmp_path):
  image = picture(30, 20)
  exif = Image.Exif()
  exif[0x0112] = 6  # stored rotated by a quarter turn to the left
  image.save(tmp_path / "turned.png", exif=exif)
  np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(np.asarray(image), 3))


def test_unreadable_pictures_are_named(tmp_path):
  picture(50, 50).save(tmp_path / "whole.png")
  (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
  (tmp_path / "text.jpg").write_text("not a picture")
  (tmp_path / "empty.png").touch()
  for name in ("torn.png", "text.jpg", "empty.png", "absent.png", ""):
    with pytest.raises(ValueError, match=f"cannot read image {tmp_path / name}"):
      read_image(tmp_path / name)
  with pytest.raises(ValueError, match=r"float64\[4, 4, 3\]"):
    read_image(np.zeros((4, 4, 3)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dinov3_preprocessing_equals_antialiased_floats(size):
  """torchvision, which the library's class uses, resizes floats by torch's antialiased interpolation."""
  image = picture(*size)
  pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
  pixels = F.interpolate(pixels, size=(24, 20), mode="bilinear", align_corners=False, antialias=True)[0]
  want = (pixels.permute(1, 2, 0).numpy() - IMAGENET_MEAN) / IMAGENET_STD
  ours = Preprocessing.from_huggingface({"size": {"height": 24, "width": 20}}, DINOV3)(image)
  np.testing.assert_allclose(ours, want, atol=5e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_longclip_preprocessing_equals_torchvision(size):
  image = picture(*size)
  # torchvision's rounding: int(size * long / short), and a crop at round((long - size) / 2).
  width, height = (25, int(25 * size[1] / size[0])) if size[0] <= size[1] else (int(25 * size[0] / size[1]), 25)
  left, top = round((width - 25) / 2), round((height - 25) / 2)
  resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 25, top + 25))
  want = (np.asarray(resized, np.float32) / 255 - OPENAI_MEAN) / OPENAI_STD
  np.testing.assert_allclose(longclip.preprocessing(25)(image), want, atol=2e-6)


@pytest.mark.parametrize("settings", [
  {"do_rescale": False},
  {"rescale_factor": 0.5},
  {"do_center_crop": False},
  {"size": {"shortest_edge": 5, "longest_edge": 9}},
  {"image_processor_type": "ViTImageProcessor"},
], ids=str)  # fmt: skip
def test_unknown_settings_are_refused(settings):
  with pytest.raises(ValueError, match="preproc"):
    Preprocessing.from_huggingface(settings, CLIP)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_the_class_named_in_the_file_decides(suffix):
  """Defaults and the order of steps depend on the class; if absent, the first class of a kind is used."""
  square = {"size": {"height": 24, "width": 24}}
  floats = Preprocessing.from_huggingface(square | {"image_processor_type": f"DINOv3ViTImageProcessor{suffix}"}, DINOV3)
  assert floats == Preprocessing.from_huggingface(square, DINOV3 | CLIP) and floats.is_float
  named = square | {"image_processor_type": f"CLIPImageProcessor{suffix}"}
  assert not Preprocessing.from_huggingface(named, DINOV3 | CLIP).is_float


def make_clip():
  vision = {"image_size": 24, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
  text = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
  settings = {"vision_config": vision | {"num_attention_heads": 2}, "text_config": text, "projection_dim": 12}
  model = randomize(CLIPModel(CLIPConfig(**settings)))
  processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
  return model, processor, lambda pixels: model.get_image_features(pixels).pooler_output


def make_dinov2():
  settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
  model = randomize(Dinov2Model(Dinov2Config(**settings)))
  processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24})
  return model, processor, lambda pixels: model(pixels).last_hidden_state[:, 0]


MAKERS = {"clip": make_clip, "dinov2": make_dinov2}


@pytest.fixture(scope="module", params=MAKERS)
def loaded(request, tmp_path_factory):
  """(embedder, the reference's embeddings of PIL images, its features of pixels, the folder)."""
  folder = tmp_path_factory.mktemp(request.param)
  model, processor, features = MAKERS[request.param]()
  model.save_pretrained(folder)
  processor.save_pretrained(folder)

  def reference(images):
    with torch.no_grad():
      pixels = processor(images=images, return_tensors="pt")["pixel_values"]
      return F.normalize(features(pixels), dim=-1).numpy()

  return embedders.load(request.param, folder), reference, features, folder


def test_embeddings_equal_the_library(loaded, tmp_path):
  embedder, reference, _, _ = loaded
  images = [picture(*size, seed=i) for i, size in enumerate(SIZES[:5])]
  ours = embedder.embed(images)
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, reference(images), atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
  # Paths and arrays are the same images; neither the batch nor its padding affects the result.
  images[0].save(tmp_path / "a.png")
  mixed = embedder.embed([tmp_path / "a.png", np.asarray(images[1]), str(tmp_path / "a.png")])
  np.testing.assert_allclose(mixed, ours[[0, 1, 0]], atol=1e-6)
  with pytest.raises(ValueError, match="no images"):
    embedder.embed([])


def test_the_network_inside_a_step_equals_torch_with_its_gradient(loaded):
  """Images are resized by bicubic interpolation without antialiasing, as in the cold-start loss."""
  embedder, _, features, _ = loaded
  network = embedder.network
  images = np.random.default_rng(0).uniform(-1, 1, size=(2, 40, 52, 3)).astype(np.float32)
  inputs = torch.from_numpy(images).requires_grad_()
  pixels = F.interpolate(inputs.permute(0, 3, 1, 2) / 2 + 0.5, size=(24, 24), mode="bicubic", align_corners=False)
  mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (network.mean, network.std))
  want = F.normalize(features((pixels - mean) / std), dim=-1)
  want.sin().sum().backward()

  def scalar(images):
    embedding = network(embedder.params, images)
    return jnp.sin(embedding).sum(), embedding

  grads, ours = jax.jit(jax.grad(scalar, has_aux=True))(jnp.asarray(images))
  np.testing.assert_allclose(ours, want.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(grads, inputs.grad.numpy(), atol=1e-5)


def test_images_of_the_right_size_are_not_resized(loaded):
  embedder, reference, _, _ = loaded
  image = np.asarray(picture(24, 24))
  ours = embedder.network(embedder.params, jnp.asarray(image[None] / 127.5 - 1))
  if embedder.network.kind == "clip":  # The other processor resizes to 32 before cropping.
    np.testing.assert_allclose(ours, reference([Image.fromarray(image)]), atol=1e-5)
  jaxpr = str(jax.make_jaxpr(embedder.network)(embedder.params, jnp.zeros((1, 24, 24, 3))))
  larger = str(jax.make_jaxpr(embedder.network)(embedder.params, jnp.zeros((1, 25, 24, 3))))
  assert larger.count("dot_general") == jaxpr.count("dot_general") + 2


def test_bfloat16_is_near(loaded):
  embedder, _, _, folder = loaded
  images = [picture(40, 30)]
  half = embedders.load(embedder.network.kind, folder, dtype="bfloat16")
  assert half.params["patch_embed"]["kernel"].dtype == jnp.bfloat16
  assert half.embed(images).dtype == np.float32
  assert (half.embed(images) * embedder.embed(images)).sum() > 0.99


def test_dinov3_folder(tmp_path):
  settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
  model = randomize(DINOv3ViTModel(DINOv3ViTConfig(**settings, patch_size=8, num_register_tokens=2)))
  model.save_pretrained(tmp_path)
  (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 24, "width": 24}, "resample": 2}))
  embedder = embedders.load("dinov3", tmp_path)
  images = [picture(40, 30), picture(20, 50)]
  pixels = torch.from_numpy(embedder.preprocessing.batch(images)).permute(0, 3, 1, 2)
  with torch.no_grad():
    want = F.normalize(model(pixels).last_hidden_state[:, 0], dim=-1).numpy()
  np.testing.assert_allclose(embedder.embed(images), want, atol=1e-5)


def test_bad_folders_are_named(loaded, tmp_path):
  _, _, _, folder = loaded
  with pytest.raises(ValueError, match="kind 'blip' is not known"):
    embedders.load("blip", folder)
  with pytest.raises(ValueError, match="absent: no such file or folder"):
    embedders.load("clip", tmp_path / "absent")
  with pytest.raises(ValueError, match="config.json: no such file"):
    embedders.load("clip", tmp_path)
  with pytest.raises(ValueError, match="0 .pt or .safetensors"):
    embedders.load("longclip", tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="neither model.safetensors nor"):
    embedders.load("clip", tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"torn")
  with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
    embedders.load("clip", tmp_path)

"""Long-CLIP in the layout of OpenAI's CLIP equals a torch model of the same equations; `.pt` files are read safely."""

import copy
import io
import os
import pickle
import zipfile

from encoder_reference import (
  TOLERANCE,
  abstract,
  assert_gradients_match,
  assert_round_trip,
  assert_same_layout,
  gradients,
  randomize,
  tensors_of,
)
from flax import nnx
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.torch import save_file
import torch
from torch import nn

from uae_jax import embedders, trees
from uae_jax.models.clip import CLIP, CLIPConfig, CLIPText, CLIPVision
from uae_jax.weights import longclip as weights
from uae_jax.weights import torch_archives
from uae_jax.weights.table import load


class Block(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
    self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

  def forward(self, x, mask=None):
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
    hidden = self.mlp["c_fc"](self.ln_2(x))
    return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class Tower(nn.Module):
  def __init__(self, width, depth):
    super().__init__()
    self.resblocks = nn.ModuleList([Block(width) for _ in range(depth)])

  def forward(self, x, mask=None):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class Visual(nn.Module):
  def __init__(self, width, depth, patch, grid, out):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
    self.class_embedding = nn.Parameter(torch.empty(width))
    self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
    self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    self.transformer = Tower(width, depth)
    self.proj = nn.Parameter(torch.empty(width, out))

  def forward(self, x):
    x = self.conv1(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
    return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class LongCLIP(nn.Module):
  """Model with the published names; its default widths of 128 and 64 give two heads and one."""

  def __init__(self, vision=(128, 2, 8, 4), width=64, depth=3, vocab=50, length=30, out=24):
    super().__init__()
    self.visual = Visual(*vision, out)
    self.transformer = Tower(width, depth)
    self.token_embedding = nn.Embedding(vocab, width)
    self.positional_embedding = nn.Parameter(torch.empty(length, width))
    self.positional_embedding_res = nn.Parameter(torch.empty(length, width))
    self.ln_final = nn.LayerNorm(width)
    self.text_projection = nn.Parameter(torch.empty(width, out))
    self.logit_scale = nn.Parameter(torch.empty(()))

  def encode_text(self, tokens):
    length = tokens.shape[1]
    positions = torch.cat([self.positional_embedding[:20], self.positional_embedding_res[20:]])[:length]
    mask = torch.full((length, length), -torch.inf).triu(1)
    x = self.ln_final(self.transformer(self.token_embedding(tokens) + positions, mask))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def reference() -> LongCLIP:
  return randomize(LongCLIP())


def test_image_features_and_gradients(reference):
  tensors = tensors_of(reference)
  config = weights.config_of(tensors_of(reference)).vision
  rows = weights.vision_table(config)
  graphdef, shapes = abstract(lambda: CLIPVision(config, rngs=nnx.Rngs(0)))
  params = load(tensors, rows, shapes, ignored=weights.IGNORED_BY_VISION)
  pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
  inputs = torch.from_numpy(pixels).requires_grad_()
  features = reference.visual(inputs)
  features.sin().sum().backward()

  ours, input_grads, grads = gradients(graphdef, params, pixels.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(ours, features.detach().numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(np.transpose(input_grads, (0, 3, 1, 2)), inputs.grad.numpy(), atol=TOLERANCE)
  names = ("visual.proj", "visual.transformer.resblocks.1.attn.in_proj_weight", "visual.conv1.weight")
  assert_gradients_match(reference, grads, rows, names)


@pytest.mark.parametrize("length", [12, 30])
def test_text_features_use_both_position_tables(reference, length):
  config = weights.config_of(tensors_of(reference)).text
  graphdef, shapes = abstract(lambda: CLIPText(config, rngs=nnx.Rngs(0)))
  tensors, rows = tensors_of(reference), weights.text_table(config)
  params = load(tensors, rows, shapes, ignored=weights.IGNORED_BY_TEXT)
  tokens = np.random.default_rng(0).integers(1, 48, size=(2, length))
  tokens[0, -1], tokens[1, 5], tokens[1, 6:] = 49, 49, 0
  with torch.no_grad():
    want = reference.encode_text(torch.from_numpy(tokens)).numpy()
  np.testing.assert_allclose(nnx.merge(graphdef, params)(jnp.asarray(tokens)), want, atol=TOLERANCE)


def test_round_trip(reference):
  tensors = tensors_of(reference)
  config = weights.config_of(tensors)
  _, shapes = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))
  assert_round_trip(tensors, weights.table(config), shapes)


def test_published_longclip_l():
  """CLIP-L with 248 positions."""
  config = CLIPConfig.longclip_l()
  _, shapes = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))
  assert trees.count(shapes) == 427_616_513 + (2 * 248 - 77) * 768
  with torch.device("meta"):
    reference = LongCLIP(vision=(1024, 24, 14, 16), width=768, depth=12, vocab=49408, length=248, out=768)
  # Views of one element: nothing is allocated at full size.
  tensors = {name: np.broadcast_to(np.float32(0), value.shape) for name, value in reference.state_dict().items()}
  assert weights.config_of(tensors) == config
  assert_same_layout(tensors, weights.table(config), shapes)


@pytest.mark.parametrize("form", ["pt", "safetensors", "folder"])
def test_embedder_of_a_file(reference, tmp_path, form):
  path = tmp_path / ("longclip.safetensors" if form == "safetensors" else "longclip.pt")
  (save_file if form == "safetensors" else torch.save)(reference.state_dict(), path)
  embedder = embedders.load("longclip", tmp_path if form == "folder" else path)
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(50, 40, 3), dtype=np.uint8))
  pixels = torch.from_numpy(embedder.preprocessing.batch([image])).permute(0, 3, 1, 2)
  with torch.no_grad():
    want = nn.functional.normalize(reference.visual(pixels), dim=-1).numpy()
  np.testing.assert_allclose(embedder.embed([image]), want, atol=TOLERANCE)


def test_official_scores_are_those_of_weights_rounded_to_float16(reference, tmp_path):
  """The official loader rounds them and computes in float32; a file of float16 gives its numbers."""
  rounded = {name: value.half() for name, value in reference.state_dict().items()}
  torch.save(rounded, tmp_path / "longclip.pt")
  embedder = embedders.load("longclip", tmp_path / "longclip.pt")
  official = copy.deepcopy(reference)
  official.load_state_dict({name: value.float() for name, value in rounded.items()})
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(50, 40, 3), dtype=np.uint8))
  pixels = torch.from_numpy(embedder.preprocessing.batch([image])).permute(0, 3, 1, 2)
  with torch.no_grad():
    want = nn.functional.normalize(official.visual(pixels), dim=-1).numpy()
    other = nn.functional.normalize(reference.visual(pixels), dim=-1).numpy()
  np.testing.assert_allclose(embedder.embed([image]), want, atol=TOLERANCE)
  assert np.abs(want - other).max() > 2 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_archives_of_torch_are_read_without_torch(tmp_path, dtype):
  base = torch.arange(24).reshape(4, 6)
  tensors = {
    "whole": base.to(dtype),
    "transposed": base.to(dtype).T,
    "part": base.to(dtype)[1:3, 2:5],
    "scalar": torch.tensor(3).to(dtype),
    "empty": torch.zeros(0, 3, dtype=dtype),
  }
  if dtype == torch.float32:
    tensors["parameter"] = nn.Parameter(base.to(dtype))
  torch.save(tensors, tmp_path / "a.pt")
  ours = torch_archives.read(tmp_path / "a.pt")
  assert ours.keys() == tensors.keys()
  for name, value in tensors.items():
    assert ours[name].shape == tuple(value.shape)
    assert str(ours[name].dtype) == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(ours[name].astype(np.float32), value.detach().float().numpy())


def test_a_state_dict_is_an_ordered_dict(tmp_path, reference):
  torch.save(reference.state_dict(), tmp_path / "a.pt")
  ours = torch_archives.read(tmp_path / "a.pt")
  for name, value in tensors_of(reference).items():
    np.testing.assert_array_equal(ours[name], value)


class Malicious:
  """Runs a shell command when an ordinary unpickler loads it."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


def write_archive(path, content: bytes, storages=()):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", content)
    for i, storage in enumerate(storages):
      archive.writestr(f"a/data/{i}", storage)


def test_a_malicious_pickle_is_refused_without_running(tmp_path):
  trap = tmp_path / "trap"
  write_archive(tmp_path / "a.pt", pickle.dumps({"weight": Malicious(trap)}, protocol=2))
  with pytest.raises(ValueError, match=r"a\.pt.*(posix|nt)\.system, which is refused"):
    torch_archives.read(tmp_path / "a.pt")
  assert not trap.exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch load", "torch._utils _rebuild_tensor", "os.path join"])
def test_every_other_name_is_refused(tmp_path, name):
  module, function = name.split()
  write_archive(tmp_path / "a.pt", f"c{module}\n{function}\n.".encode())
  with pytest.raises(ValueError, match=f"asks for {module}.{function}"):
    torch_archives.read(tmp_path / "a.pt")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
  """numpy would read memory outside the storage."""
  torch.save({"a": torch.zeros(4)}, tmp_path / "good.pt")
  with zipfile.ZipFile(tmp_path / "good.pt") as archive:
    content = archive.read("good/data.pkl")
  assert content.count(b"K\x04\x85") == 1  # the shape (4,)
  write_archive(tmp_path / "a.pt", content.replace(b"K\x04\x85", b"K\x40\x85"), [np.zeros(4, np.float32).tobytes()])
  with pytest.raises(ValueError, match="beyond its storage of 4"):
    torch_archives.read(tmp_path / "a.pt")


def test_torn_and_foreign_files_are_named(tmp_path):
  torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pt")
  (tmp_path / "torn.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
  torch.save([torch.zeros(2)], tmp_path / "list.pt")
  buffer = io.BytesIO()
  torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
  (tmp_path / "legacy.pt").write_bytes(buffer.getvalue())
  for name in ("torn", "list", "legacy", "absent"):
    with pytest.raises(ValueError, match=f"{name}.pt"):
      torch_archives.read(tmp_path / f"{name}.pt")
  with pytest.raises(ValueError, match="no visual.conv1.weight"):
    weights.config_of(torch_archives.read(tmp_path / "whole.pt"))

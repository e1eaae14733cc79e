"""Image embedders, the rewards and metrics of UAE: CLIP, Long-CLIP, DINOv2, DINOv3.

`load(kind, path).embed(images)` is the benchmark: pictures of any size, preprocessed on the host as its library
does.
`EmbeddingNetwork` is the same network inside a jitted step: images on the device, resized by a differentiable bicubic.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm

from uae_jax import sharding
from uae_jax.data.preprocessing import ImageSource, Preprocessing
from uae_jax.layers.resize import resize
from uae_jax.models.clip import CLIPConfig, CLIPVision
from uae_jax.models.dinov2 import DINOv2, DINOv2Config
from uae_jax.models.dinov3 import DINOv3, DINOv3Config
from uae_jax.weights import clip, dinov2, dinov3, longclip, table, tensor_files

KINDS = ("clip", "longclip", "dinov2", "dinov3")
NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class EmbeddingNetwork:
  """One embedding network as a pure function of its parameters, to be called inside jit.

  Attributes:
    kind: one of `KINDS`; names the architecture in logs.
    graphdef: of a module that maps normalized pixels float[B, height, width, 3] to features float[B, E].
    image_size: side of the square that images are stretched to.
    mean: of the channels in 0..1.
    std: of the channels in 0..1.
  """

  kind: str
  graphdef: nnx.GraphDef
  image_size: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, params: dict, images: jax.Array) -> jax.Array:
    """Unit-norm embeddings of images, differentiable in both arguments.

    The whole image is stretched to the network's size with torch's bicubic without antialiasing, as the official
    cold-start loss does; an image that has the size already is not resized. Computes in the dtype of the parameters.

    Args:
      params: nested dict of the network.
      images: float[B, H, W, 3] in [-1, 1].

    Returns:
      float32[B, E].
    """
    pixels = resize(0.5 * images.astype(jnp.float32) + 0.5, self.image_size, self.image_size)
    return self.embed_pixels(params, (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std))

  def embed_pixels(self, params: dict, pixels: jax.Array) -> jax.Array:
    """Unit-norm embeddings float32[B, E] of pixels float[B, height, width, 3], resized and normalized."""
    dtype = params["patch_embed"]["kernel"].dtype
    features = self.network(params)(pixels.astype(dtype)).astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), NORM_FLOOR)

  def network(self, params: dict) -> nnx.Module:
    """The module over its parameters."""
    return nnx.merge(self.graphdef, params)


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
  """A loaded network with the preprocessing of its benchmark.

  Attributes:
    encoder: the network as a pure function.
    params: its parameters, a nested dict.
    preprocessing: from pictures to pixels, on the host.
    batch_size: pictures a call of the network; smaller inputs use the next power of two.
  """

  encoder: EmbeddingNetwork
  params: dict[str, Any]
  preprocessing: Preprocessing
  batch_size: int = 16

  def embed(self, images: Sequence[ImageSource], *, progress: bool = False) -> np.ndarray:
    """Embeddings of pictures.

    Args:
      images: PIL images, paths, or uint8[H, W, 3] arrays, of any sizes.
      progress: shows a bar.

    Returns:
      float32[B, E], each row of norm 1.

    Raises:
      ValueError: a picture cannot be read, or there is none.
    """
    if not images:
      raise ValueError("no images to embed")
    size = min(self.batch_size, 1 << (len(images) - 1).bit_length())
    rows = []
    for start in tqdm(range(0, len(images), size), desc=self.encoder.kind, unit="batch", disable=not progress):
      pixels = self.preprocessing.batch(images[start : start + size])
      padded = np.zeros((size, *pixels.shape[1:]), np.float32)
      padded[: len(pixels)] = pixels
      rows.append(np.asarray(self._embed_pixels(self.params, padded))[: len(pixels)])
    return np.concatenate(rows)

  @functools.cached_property
  def _embed_pixels(self) -> Callable:
    return jax.jit(self.encoder.embed_pixels)


def load(kind: str, path: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Embedder:
  """An embedder from its published files.

  Args:
    kind: one of `KINDS`.
    path: for clip, dinov2 and dinov3 a Hugging Face folder (`config.json`, `preprocessor_config.json`, safetensors);
      for longclip a `.pt` or `.safetensors` file in the layout of OpenAI's CLIP, or a folder with one of them.
    dtype: of the parameters and the computation.
    mesh: where the parameters live; one device by default.

  Raises:
    ValueError: the kind is unknown, or the files are missing, torn or of another network.
  """
  path, mesh = Path(path), mesh or sharding.make_mesh(devices=jax.devices()[:1])
  if kind not in KINDS:
    raise ValueError(f"embedder kind {kind!r} is not known; expected one of {', '.join(KINDS)}")
  if not path.exists():
    raise ValueError(f"{path}: no such file or folder ({kind} embedder)")
  if kind == "longclip":
    return _load_longclip(path, dtype, mesh)
  settings, tensors = _read_json(path / "config.json"), tensor_files.open_folder(path)
  preprocessing = Preprocessing.from_huggingface(_processor_settings(path), is_float=kind == "dinov3")
  try:
    if kind == "clip":
      config = CLIPConfig.from_huggingface(settings).vision
      make, rows, ignored = CLIPVision, clip.vision_table(config), clip.IGNORED_BY_VISION
    elif kind == "dinov2":
      config = DINOv2Config.from_huggingface(settings)
      make, rows, ignored = DINOv2, dinov2.table(config, v5=dinov2.is_v5(tensors)), dinov2.IGNORED
    else:
      config = DINOv3Config.from_huggingface(settings)
      make, rows, ignored = DINOv3, dinov3.table(config, v5=dinov3.is_v5(tensors)), dinov3.IGNORED
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path / 'config.json'}: not a {kind} network ({error})") from error
  return _assemble(
    kind, lambda: make(config, rngs=nnx.Rngs(0)), tensors, rows, ignored, preprocessing, dtype, path, mesh
  )


def _load_longclip(path: Path, dtype: str, mesh: Mesh) -> Embedder:
  if path.is_dir():
    files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".safetensors"))
    if len(files) != 1:
      raise ValueError(f"{path}: {len(files)} .pt or .safetensors files, expected 1 (longclip embedder)")
    path = files[0]
  tensors = tensor_files.open_file(path)
  try:
    config = longclip.config_of(tensors).vision
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  rows, preprocessing = longclip.vision_table(config), Preprocessing.longclip(config.image_size)
  tensors, ignored = longclip.unfuse(tensors), longclip.IGNORED_BY_VISION
  return _assemble(
    "longclip", lambda: CLIPVision(config, rngs=nnx.Rngs(0)), tensors, rows, ignored, preprocessing, dtype, path, mesh
  )


def _assemble(
  kind, build, tensors, rows, ignored, preprocessing: Preprocessing, dtype: str, path: Path, mesh: Mesh
) -> Embedder:
  """Fills the network that `build` makes; nothing is initialized."""
  graphdef, abstract = sharding.abstract_model(build, mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), abstract)
  params = table.load(tensors, rows, abstract, ignored=ignored, source=str(path))
  height, width = preprocessing.output_size
  if height != width:
    raise ValueError(f"{path}: the preprocessing gives {height} x {width} pixels, expected a square")
  encoder = EmbeddingNetwork(kind, graphdef, height, preprocessing.mean, preprocessing.std)
  return Embedder(
    encoder, jax.tree.map(lambda x, want: jax.device_put(x, want.sharding), params, abstract), preprocessing
  )


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise ValueError(f"{path}: no such file") from error
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error


def _processor_settings(folder: Path) -> dict[str, Any]:
  """The image processor's settings; transformers 5 may store them inside those of the whole processor."""
  whole = folder / "processor_config.json"
  if whole.exists() and not (folder / "preprocessor_config.json").exists():
    return _read_json(whole)["image_processor"]
  return _read_json(folder / "preprocessor_config.json")

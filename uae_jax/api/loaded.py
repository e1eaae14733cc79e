"""What the halves of the Python API share: weights, processor, prepared images and compiled programs."""

from collections.abc import Iterable
import os

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from PIL import Image

from uae_jax.files import local_path
from uae_jax.models.prompts import Prompts
from uae_jax.models.uae import UAE as Model
from uae_jax.networks import merge_uae
from uae_jax.weights import checksums
from uae_jax.weights.checkpoint import LoadedUAE

Images = Iterable[Image.Image | str | os.PathLike]
NOT_FINITE = "another dtype may help, or the weights are damaged"


class Loaded:
  """Weights with their processor and settings.

  Attributes:
    params: nested dict of arrays.
    processor: tokenizer and image processor.
    inference: `InferenceSettings`, the defaults of all methods.
  """

  def __init__(self, loaded: LoadedUAE, mesh: jax.sharding.Mesh | None = None):
    self.params = loaded.params
    self.processor = loaded.processor
    self.inference = loaded.inference
    self._graphdef = loaded.graphdef
    self._config = loaded.config
    # Results are whole on every device, and thus in every process.
    self._whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None and mesh.size > 1 else None
    # Jitted functions by a key of method, input shapes and static arguments.
    self._programs: dict = {}
    self._prompts_of_grid: dict[tuple[int, int], Prompts] = {}

  @property
  def is_small_world(self) -> bool:
    """Whether the weights were trained on the procedural scenes only."""
    return self.inference.is_small_world

  def fingerprint(self) -> str:
    """Returns 16 hexadecimal digits of the weights' bits: the same weights in the same dtype have the same."""
    return checksums.fingerprint(self.params)

  def _prepare(self, images: Images):
    """Yields (image uint8[h, w, 3] at the captioner's resolution, prompts for its patch grid)."""
    is_one = isinstance(images, str | os.PathLike | Image.Image)
    if is_one or (isinstance(images, np.ndarray) and images.ndim < 4):
      raise ValueError(f"images is one {type(images).__name__}, expected a list of images or paths")
    for image in images:
      if isinstance(image, str | os.PathLike):
        image = local_path(image)
      pixels = np.asarray(self.processor.resize(image))
      yield pixels, self._prompts(self._grid(pixels))

  def _grid(self, pixels: np.ndarray) -> tuple[int, int]:
    """(rows, columns) of patches of an image uint8[h, w, 3]."""
    patch = self._config.captioner.patch_size
    return pixels.shape[0] // patch, pixels.shape[1] // patch

  def _prompts(self, grid: tuple[int, int]) -> Prompts:
    if grid not in self._prompts_of_grid:
      self._prompts_of_grid[grid] = Prompts.from_processor(self.processor, grid)
    return self._prompts_of_grid[grid]

  def _model(self, params: dict, *, adapters: bool = True) -> Model:
    return merge_uae(self._graphdef, params, adapters=adapters)

  def _program(self, key, function):
    """Returns the jitted function of a key; `function` is ignored if the key is known, so it is traced only once."""
    if key not in self._programs:
      self._programs[key] = jax.jit(function, out_shardings=self._whole)
    return self._programs[key]

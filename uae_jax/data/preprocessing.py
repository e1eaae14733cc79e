"""Host preprocessing of images for the embedders.

Source: the image processors of transformers 5.23 (`PilBackend`, and `TorchvisionBackend` where floats are resized);
torchvision's `Resize` and `CenterCrop`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from uae_jax.data.images import ImageSource, read_image
from uae_jax.layers import resize

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

METHODS: dict[int, str] = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Maps RGB images of any size to the normalized pixels of one embedder.

  Attributes:
    resize: target length of the shortest side in pixels, keeping the aspect ratio; (height, width) to stretch the image
      to; or None to keep the size. See `resizes_longest`.
    crop: (height, width) of the center crop in pixels, or None; smaller images are padded with black.
    resample: PIL's number of the resampling filter.
    mean: channel means of pixels in [0, 1].
    std: channel standard deviations of pixels in [0, 1].
    is_float: resize after scaling to [0, 1], with torch's antialiased filter, instead of in 8 bits with PIL.
    rounds_crop: round crop offsets half to even (torchvision) instead of down (transformers).
    resizes_longest: `resize` is the length of the longest side, and half of the padding, rounded down, comes first
      (open_clip).
  """

  resize: int | tuple[int, int] | None
  crop: tuple[int, int] | None
  resample: int = Image.Resampling.BICUBIC
  mean: tuple[float, float, float] = OPENAI_MEAN
  std: tuple[float, float, float] = OPENAI_STD
  is_float: bool = False
  rounds_crop: bool = False
  resizes_longest: bool = False

  def __post_init__(self):
    if self.crop is None and not isinstance(self.resize, tuple):
      raise ValueError("preprocessing gives images of different sizes: set do_center_crop, or size to height and width")
    if self.is_float and self.resample not in METHODS:
      raise ValueError(f"resample {self.resample} is not known; expected one of {[int(m) for m in METHODS]}")

  @property
  def output_size(self) -> tuple[int, int]:
    """(height, width) of the output."""
    if self.crop is not None:
      return self.crop
    assert isinstance(self.resize, tuple)  # checked by __post_init__ if there is no crop
    return self.resize

  @classmethod
  def from_huggingface(
    cls, settings: Mapping[str, Any], processors: Mapping[str, Mapping[str, Any]]
  ) -> "Preprocessing":
    """Reads the content of a `preprocessor_config.json`.

    Args:
      settings: content of the file; absent or null fields get the defaults of the transformers class.
      processors: `image_processor_type`, without "Fast" or "Pil" -> class attributes, named as in transformers. In
        addition, `default_to_square` means that a single number as size is a square, and `resizes_floats` that the
        class rescales before it resizes. Files without a type use the first entry.

    Raises:
      ValueError: the file names another class, or uses an unsupported setting.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    kind = settings.pop("image_processor_type", next(iter(processors))).removesuffix("Fast").removesuffix("Pil")
    if kind not in processors:
      raise ValueError(
        f"preprocessor_config.json: image_processor_type is {kind!r}; expected {' or '.join(processors)}"
      )
    if not settings.get("do_rescale", True) or not np.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255):
      raise ValueError("preprocessor_config.json: only do_rescale with rescale_factor 1/255 is supported")
    settings = {"do_resize": True, "do_normalize": True} | dict(processors[kind]) | settings
    normalizes = settings["do_normalize"]
    return cls(
      _size(settings["size"], is_square=settings.get("default_to_square", False)) if settings["do_resize"] else None,
      _crop_size(settings["crop_size"]) if settings["do_center_crop"] else None,
      settings["resample"],
      tuple(settings["image_mean"]) if normalizes else (0.0,) * 3,
      tuple(settings["image_std"]) if normalizes else (1.0,) * 3,
      processors[kind].get("resizes_floats", False),
    )

  def __call__(self, source: ImageSource) -> np.ndarray:
    """Normalized pixels float32[height, width, 3] of one image."""
    image = read_image(source)
    height, width = self._resized(image.height, image.width)
    if self.is_float:
      pixels = np.asarray(image, np.float32) * np.float32(1 / 255)
      pixels = self._crop(_resize_floats(pixels, height, width, METHODS[self.resample]))
    else:
      image = image.resize((width, height), self.resample)
      pixels = self._crop(np.asarray(image)).astype(np.float32) * np.float32(1 / 255)
    return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

  def batch(self, sources: Sequence[ImageSource]) -> np.ndarray:
    """Normalized pixels float32[B, height, width, 3] of several images."""
    return np.stack([self(source) for source in sources])

  def _resized(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing."""
    if self.resize is None:
      return height, width
    if isinstance(self.resize, tuple):
      return self.resize
    if self.resizes_longest:
      scale = self.resize / max(height, width)
      return round(height * scale), round(width * scale)
    longest = int(self.resize * max(height, width) / min(height, width))
    return (longest, self.resize) if width <= height else (self.resize, longest)

  def _crop(self, pixels: np.ndarray) -> np.ndarray:
    """The center crop of [H, W, 3], padded with black if the image is smaller."""
    if self.crop is None:
      return pixels
    out = np.zeros((*self.crop, pixels.shape[2]), pixels.dtype)
    theirs, ours = [], []
    for size, target in zip(pixels.shape[:2], self.crop, strict=True):
      # Negative if the image is smaller than the crop.
      start = round((size - target) / 2) if self.rounds_crop else (size - target) // 2
      if self.resizes_longest:
        start = -((target - size) // 2)
      length = min(size, target)
      theirs.append(slice(max(start, 0), max(start, 0) + length))
      ours.append(slice(max(-start, 0), max(-start, 0) + length))
    out[tuple(ours)] = pixels[tuple(theirs)]
    return out


def _size(size: int | Sequence[int] | Mapping[str, int], *, is_square: bool) -> int | tuple[int, int]:
  """Parses a `size` or `crop_size` in any form of transformers; `is_square`: a single number means a square."""
  if isinstance(size, int):
    return (size, size) if is_square else size
  if not isinstance(size, Mapping):
    return (size[0], size[1]) if len(size) == 2 else _size(size[0], is_square=is_square)
  if set(size) == {"height", "width"}:
    return size["height"], size["width"]
  if set(size) == {"shortest_edge"}:
    return size["shortest_edge"]
  raise ValueError(
    f"preprocessor_config.json: size {dict(size)} is not known; expected shortest_edge, or height and width"
  )


def _crop_size(size: int | Sequence[int] | Mapping[str, int]) -> tuple[int, int]:
  """Parses a `crop_size`, in which a single number means a square."""
  sides = _size(size, is_square=True)
  if not isinstance(sides, tuple):
    raise ValueError(f"preprocessor_config.json: crop_size {size!r} is not known; expected height and width")
  return sides


def _resize_floats(pixels: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
  """Resizes with antialiasing, as torch does: float32[H, W, 3] -> float32[height, width, 3]."""
  rows = resize.matrix(pixels.shape[0], height, method, True)
  columns = resize.matrix(pixels.shape[1], width, method, True)
  pixels = np.tensordot(rows, pixels, axes=(1, 0))
  return np.ascontiguousarray(np.moveaxis(np.tensordot(pixels, columns, axes=(1, 1)), 2, 1))

"""Pictures from anywhere as upright RGB, and the preprocessing of the embedders on the host.

Source: the image processors of transformers 5.23 (`PilBackend`, and `TorchvisionBackend` where floats are resized);
torchvision's `Resize` and `CenterCrop`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from uae_jax.layers import resize

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

METHODS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}

ImageSource = Image.Image | str | os.PathLike | np.ndarray


def read_image(source: ImageSource) -> Image.Image:
  """Any picture as RGB: turned as its EXIF says, transparency laid on white, deep grey scaled to eight bits.

  Args:
    source: a path, a PIL image of any mode, or uint8[H, W], [H, W, 3] or [H, W, 4].

  Raises:
    ValueError: the file is missing, torn or no picture (naming it); the array is of another dtype or shape.
  """
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or not (source.ndim == 2 or source.ndim == 3 and source.shape[2] in (3, 4)):
      raise ValueError(
        f"image array of {source.dtype}{list(source.shape)}, expected uint8[H, W], [H, W, 3] or [H, W, 4]"
      )
    return to_rgb(Image.fromarray(source))
  if isinstance(source, Image.Image):
    return to_rgb(source)
  try:
    with Image.open(source) as image:
      return to_rgb(image)
  except Exception as error:  # The decoders of PIL raise a dozen kinds for a torn file.
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    raise ValueError(f"cannot read image {os.fspath(source)}: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
  """A PIL image of any mode as upright RGB."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):
    # PIL would clip at 255 what is nearly always sixteen-bit grey.
    image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From RGB of any size to the normalized pixels of one embedder.

  Attributes:
    resize: the shortest side (aspect kept), or (height, width) to stretch to, or None to leave the size.
    crop: (height, width) of the center that is kept, or None; where the picture is smaller it is surrounded by black.
    resample: PIL's number of the filter.
    mean: of the channels in 0..1.
    std: of the channels in 0..1.
    is_float: resizes after scaling to 0..1, with torch's antialiased filter, instead of in eight bits by PIL.
    rounds_crop: centers the crop at half-even rounded offsets (torchvision) instead of floored ones (transformers).
  """

  resize: int | tuple[int, int] | None
  crop: tuple[int, int] | None
  resample: int = Image.Resampling.BICUBIC
  mean: tuple[float, float, float] = OPENAI_MEAN
  std: tuple[float, float, float] = OPENAI_STD
  is_float: bool = False
  rounds_crop: bool = False

  def __post_init__(self):
    if self.crop is None and not isinstance(self.resize, tuple):
      raise ValueError("preprocessing gives images of different sizes: set do_center_crop, or size to height and width")
    if self.is_float and self.resample not in METHODS:
      raise ValueError(f"resample {self.resample} is not known; expected one of {[int(m) for m in METHODS]}")

  @property
  def output_size(self) -> tuple[int, int]:
    """(height, width) of every result."""
    return self.crop or self.resize

  @classmethod
  def from_huggingface(
    cls, settings: Mapping[str, Any], processors: Mapping[str, Mapping[str, Any]]
  ) -> "Preprocessing":
    """From a `preprocessor_config.json`.

    Args:
      settings: the file; fields that are absent or null have the defaults of the library's class.
      processors: `image_processor_type`, without "Fast" or "Pil" -> the attributes of that class, under the names of
        the library. Besides, `default_to_square` says what a single number as size means, and `resizes_floats` that
        the class rescales before it resizes. Files without a type belong to the first.

    Raises:
      ValueError: the file names another class, or asks for something this class does not do.
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
      _size(settings["crop_size"], is_square=True) if settings["do_center_crop"] else None,
      settings["resample"],
      tuple(settings["image_mean"]) if normalizes else (0.0,) * 3,
      tuple(settings["image_std"]) if normalizes else (1.0,) * 3,
      processors[kind].get("resizes_floats", False),
    )

  def __call__(self, source: ImageSource) -> np.ndarray:
    """float32[height, width, 3] of one picture."""
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
    """float32[B, height, width, 3]."""
    return np.stack([self(source) for source in sources])

  def _resized(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing."""
    if self.resize is None:
      return height, width
    if isinstance(self.resize, tuple):
      return self.resize
    longest = int(self.resize * max(height, width) / min(height, width))
    return (longest, self.resize) if width <= height else (self.resize, longest)

  def _crop(self, pixels: np.ndarray) -> np.ndarray:
    """The center of [H, W, 3]."""
    if self.crop is None:
      return pixels
    out = np.zeros((*self.crop, pixels.shape[2]), pixels.dtype)
    theirs, ours = [], []
    for size, target in zip(pixels.shape[:2], self.crop, strict=True):
      # Negative where the picture is smaller than the crop.
      start = round((size - target) / 2) if self.rounds_crop else (size - target) // 2
      length = min(size, target)
      theirs.append(slice(max(start, 0), max(start, 0) + length))
      ours.append(slice(max(-start, 0), max(-start, 0) + length))
    out[tuple(ours)] = pixels[tuple(theirs)]
    return out


def _size(size: int | Sequence[int] | Mapping[str, int], *, is_square: bool) -> int | tuple[int, int]:
  """A `size` or `crop_size` in any of the spellings of the library; `is_square` is what a single number means."""
  if isinstance(size, int):
    return (size, size) if is_square else size
  if not isinstance(size, Mapping):
    return tuple(size) if len(size) == 2 else _size(size[0], is_square=is_square)
  if set(size) == {"height", "width"}:
    return size["height"], size["width"]
  if set(size) == {"shortest_edge"}:
    return size["shortest_edge"]
  raise ValueError(
    f"preprocessor_config.json: size {dict(size)} is not known; expected shortest_edge, or height and width"
  )


def _resize_floats(pixels: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
  """float32[H, W, 3] -> float32[height, width, 3], antialiased, as torch does it."""
  rows = resize.matrix(pixels.shape[0], height, method, True)
  columns = resize.matrix(pixels.shape[1], width, method, True)
  pixels = np.tensordot(rows, pixels, axes=(1, 0))
  return np.ascontiguousarray(np.moveaxis(np.tensordot(pixels, columns, axes=(1, 1)), 2, 1))

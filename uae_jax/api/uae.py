"""A trained UAE, loaded from the official weights, a run, or an export."""

import dataclasses
import os

import jax

from uae_jax import sharding
from uae_jax.api.generation import Generation
from uae_jax.api.loaded import Images
from uae_jax.api.understanding import KEPT_NAMES, Understanding
from uae_jax.files import input_path
from uae_jax.layers.quantized import quantize
from uae_jax.training import restore


class UAE(Understanding, Generation):
  """A trained UAE: captions images, generates images from text, and reconstructs images through their captions.

  Attributes:
    params: nested dict of arrays.
    processor: tokenizer and image processor.
    inference: `InferenceSettings`, the defaults of all methods.
  """

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    *,
    int8: bool = False,
  ) -> "UAE":
    """Loads a UAE from the official folder layout, the workdir of a run, or an export of `uae-jax convert`.

    Args:
      path: folder with `llm_model/`, `dit/`, ...; or a workdir with `config.json` and `checkpoints/`, or
        `checkpoints/<stage>` in it; or an export.
      dtype: dtype of the parameters: "bfloat16", "float32", or "auto" for that of the files.
      mesh: mesh over which the parameters are sharded; the first device of this process by default.
      int8: store the matrices of captioner and decoder as int8; see `layers.quantized`.

    Raises:
      FileNotFoundError: the folder does not exist or has none of these layouts.
      ValueError: the dtype is unknown, or the source is damaged.
      weights.table.WeightError: tensors are missing, unexpected or have a wrong shape.
    """
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    loaded = restore.read(input_path(path), dtype, mesh)
    if int8:
      loaded = dataclasses.replace(loaded, params=quantize(loaded.params))
    return cls(loaded, mesh)

  def reconstruct(self, images: Images, **options) -> tuple[list[str], list]:
    """Captions images and generates images from the captions.

    Args:
      images: PIL images or paths, of any mode and size.
      **options: arguments of `caption` and of `generate`; `seed`, `indices` and `batch_size` are passed to both.

    Returns:
      (captions, images).

    Raises:
      TypeError: an option is unknown.
    """
    shared = ("seed", "indices", "batch_size")
    caption_names = ("max_new_tokens", "temperature", "repetition_penalty", *KEPT_NAMES, *shared)
    generate_names = ("steps", "guidance", "guidance_interval", "height", "width", "latents", "output", *shared)
    unknown = set(options) - set(caption_names) - set(generate_names)
    if unknown:
      raise TypeError(f"reconstruct has no option {sorted(unknown)}")
    captions = self.caption(images, **{name: options[name] for name in caption_names if name in options})
    return captions, self.generate(captions, **{name: options[name] for name in generate_names if name in options})

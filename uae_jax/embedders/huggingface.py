"""Opens model folders of transformers: `config.json`, `preprocessor_config.json`, safetensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uae_jax import json_files
from uae_jax.data import processor_files
from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders.kind import Checkpoint
from uae_jax.models.vit import ViTConfig
from uae_jax.weights import fields, tensor_files
from uae_jax.weights.table import Row, depth_problems

# Settings of an image processor that `Preprocessing.from_huggingface` reads; images are always converted to RGB.
KNOWN_SETTINGS = (
  *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
  *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
TOWERS = ("vision_config", "text_config")
MAX_PX = 4096


def opener(
  kind: str,
  *,
  model_types: tuple[str, ...],
  config: Callable[[Mapping[str, Any]], ViTConfig],
  table: Callable[[Any, Mapping], tuple[Row, ...]],
  ignored: Mapping[str, str],
  processors: Mapping[str, Mapping[str, Any]],
) -> Callable[[Path], Checkpoint]:
  """Makes a function that opens folders of one kind of embedder.

  Args:
    kind: name of the kind, for error messages.
    model_types: values of `model_type`; an absent one is not checked.
    config: content of `config.json` -> config of the model; may raise `KeyError`, `TypeError` or `ValueError`.
    table: (config, tensors) -> rows for every parameter.
    ignored: regular expression over tensor names -> reason why matching tensors are not read.
    processors: `image_processor_type` -> defaults of that class, see `Preprocessing.from_huggingface`.
  """

  def open_folder(folder: Path) -> Checkpoint:
    file = folder / "config.json"
    settings = json_files.read_object(file)
    if found := tower_problems(settings):
      raise ValueError(f"{file}: {'; '.join(found)}")
    if (found := settings.get("model_type", model_types[0])) not in model_types:
      raise ValueError(f"{file}: model_type is {found!r:.100}, expected {' or '.join(map(repr, model_types))}")
    try:
      network = config(settings)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
      raise ValueError(f"{file}: not a {kind} network ({error})") from error
    tensors = tensor_files.open_folder(folder)
    rows = tuple(table(network, tensors))
    if found := depth_problems(rows, tensors, network.depth):
      raise ValueError(f"{file}: {'; '.join(found)}")
    return Checkpoint(network, tensors, rows, ignored, read_preprocessing(folder, processors))

  return open_folder


def tower_problems(settings: Mapping[str, Any]) -> list[str]:
  """What is not supported in a `config.json` of one tower or two."""
  towers = [settings, *(tower for name in TOWERS if isinstance(tower := settings.get(name), dict))]
  return [problem for tower in towers for problem in fields.TOWER.check(tower).problems]


def read_preprocessing(folder: Path, processors: Mapping[str, Mapping[str, Any]]) -> Preprocessing:
  """Reads the settings of the image processor; for `processors` see `Preprocessing.from_huggingface`.

  Raises:
    ValueError: the settings are missing or not supported; the message names their file.
  """
  file, settings = processor_files.image_settings(folder)
  processor_files.warn_unknown(file, settings, KNOWN_SETTINGS)
  try:
    made = Preprocessing.from_huggingface(settings, processors)
    height, width = made.output_size
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
    raise ValueError(f"{file}: the settings of the image processor are not understood ({error})") from error
  if any(type(side) is not int or not 0 < side <= MAX_PX for side in (height, width)):
    raise ValueError(f"{file}: images of {height!r:.20} x {width!r:.20} pixels, expected sides from 1 to {MAX_PX}")
  for name, values, is_divisor in (("image_mean", made.mean, False), ("image_std", made.std, True)):
    if not processor_files.is_statistic(list(values), is_divisor=is_divisor):
      raise ValueError(f"{file}: {name} is {values!r:.60}, expected three numbers")
  return made

"""Opens model folders of transformers: `config.json`, `preprocessor_config.json`, safetensors."""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
from typing import Any

from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders.kind import Checkpoint
from uae_jax.models.vit import ViTConfig
from uae_jax.weights import tensor_files
from uae_jax.weights.table import Row


def opener(
  kind: str,
  *,
  config: Callable[[Mapping[str, Any]], ViTConfig],
  table: Callable[[Any, Mapping], tuple[Row, ...]],
  ignored: Mapping[str, str],
  processors: Mapping[str, Mapping[str, Any]],
) -> Callable[[Path], Checkpoint]:
  """Makes a function that opens folders of one kind of embedder.

  Args:
    kind: name of the kind, for error messages.
    config: content of `config.json` -> config of the model; may raise `KeyError`, `TypeError` or `ValueError`.
    table: (config, tensors) -> rows for every parameter.
    ignored: regular expression over tensor names -> reason why matching tensors are not read.
    processors: `image_processor_type` -> defaults of that class, see `Preprocessing.from_huggingface`.
  """

  def open_folder(folder: Path) -> Checkpoint:
    file = folder / "config.json"
    settings = read_json(file)
    try:
      network = config(settings)
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{file}: not a {kind} network ({error})") from error
    tensors = tensor_files.open_folder(folder)
    preprocessing = Preprocessing.from_huggingface(processor_settings(folder), processors)
    return Checkpoint(network, tensors, table(network, tensors), ignored, preprocessing)

  return open_folder


def processor_settings(folder: Path) -> dict[str, Any]:
  """The settings of the image processor; transformers 5 may store them inside `processor_config.json`."""
  whole = folder / "processor_config.json"
  if whole.exists() and not (folder / "preprocessor_config.json").exists():
    return read_json(whole)["image_processor"]
  return read_json(folder / "preprocessor_config.json")


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON file.

  Raises:
    ValueError: the file is missing or not JSON.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise ValueError(f"{path}: no such file") from error
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from error

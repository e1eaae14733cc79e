"""Opens both towers of a checkpoint in the layout of OpenAI's CLIP: one file, without a config or a processor."""

from collections.abc import Callable, Mapping
import functools
from pathlib import Path

from uae_jax.data import processor_files
from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders.kind import Checkpoint, TextTower
from uae_jax.models.clip import CLIPConfig, CLIPText, CLIPTextConfig
from uae_jax.weights import longclip, tensor_files
from uae_jax.weights.table import Row

TOKENIZER_FILES = ("vocab.json", "merges.txt")


def checkpoint_file(kind: str, path: Path) -> Path:
  """The `.pt` or `.safetensors` file that a path names: itself, or the only one in a folder."""
  if not path.is_dir():
    return path
  files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".safetensors"))
  if len(files) != 1:
    raise ValueError(f"{path}: {len(files)} .pt or .safetensors files, expected 1 ({kind} embedder)")
  return files[0]


def _open(kind: str, path: Path, config_of: Callable[[Mapping], CLIPConfig]) -> tuple[Mapping, CLIPConfig]:
  tensors = tensor_files.open_file(path)
  try:
    return tensors, config_of(tensors)
  except (ValueError, ArithmeticError, KeyError, IndexError) as error:
    raise ValueError(f"{path}: not a {kind} checkpoint ({error})") from error


def open_image(
  kind: str, path: Path, config_of: Callable[[Mapping], CLIPConfig], preprocessing: Callable[[int], Preprocessing]
) -> Checkpoint:
  """Opens the image tower.

  Args:
    kind: name of the kind, for error messages.
    path: a `.pt` or `.safetensors` file, or a folder with one such file.
    config_of: tensors -> config; may raise `ValueError`.
    preprocessing: side of the input in pixels -> preprocessing.

  Raises:
    ValueError: the file is missing, damaged or of another model; the message names it.
  """
  path = checkpoint_file(kind, path)
  tensors, config = _open(kind, path, config_of)
  table = longclip.vision_table(config.vision)
  made = preprocessing(config.vision.image_px)
  return Checkpoint(config.vision, tensors, table, longclip.IGNORED_BY_VISION, made)


def open_text(
  kind: str,
  path: Path,
  config_of: Callable[[Mapping], CLIPConfig],
  text_table: Callable[[CLIPTextConfig], tuple[Row, ...]],
) -> TextTower:
  """Opens the text tower; the tokenizer of CLIP lies beside the checkpoint. Arguments: see `open_image`.

  Raises:
    ValueError: a file is missing, damaged or of another model; the message names it.
  """
  file = checkpoint_file(kind, path)
  if absent := [name for name in TOKENIZER_FILES if not (file.parent / name).is_file()]:
    raise ValueError(
      f"{file.parent}: no {absent[0]}: copy {' and '.join(TOKENIZER_FILES)} of CLIP beside the checkpoint"
    )
  tensors, config = _open(kind, file, config_of)
  tokenizer = functools.partial(processor_files.read_clip_tokenizer, file.parent)
  return TextTower(CLIPText, config.text, tensors, text_table(config.text), longclip.IGNORED_BY_TEXT, tokenizer)

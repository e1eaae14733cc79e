"""The decoder's pooled conditioning: the empty prompt's embeddings from SD3's two CLIP text towers, concatenated.

The vector is the same for every image, so it is computed once, when weights are loaded, and the text towers are
discarded.
"""

from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import json_files, sharding
from uae_jax.data import clip_tokens
from uae_jax.models.clip import CLIPText, CLIPTextConfig
from uae_jax.weights import clip, fields, finite, table, tensor_files

ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
# Where an export stores the vector, so that it need not include the text towers.
FILE, NAME = "pooled_empty_prompt.safetensors", "pooled"


def read(folder: Path) -> np.ndarray:
  """Reads or computes the pooled embedding float32[P] of the empty prompt.

  Args:
    folder: the `SD3` folder.

  Raises:
    WeightError: a text tower is missing, not finite, or does not match its config.
  """
  if (folder / FILE).exists():
    tensors = tensor_files.open_file(folder / FILE)
    if NAME not in tensors:
      raise table.WeightError(str(folder / FILE), [f"missing {NAME}"])
    condition = np.asarray(tensors[NAME], np.float32)
    if not np.all(np.isfinite(condition)):
      raise table.WeightError(str(folder / FILE), [f"{NAME} {finite.WHAT}"])
    return condition
  problems, parts = [], []
  for encoder, tokenizer in ENCODERS:
    try:
      parts.append(embed(folder / encoder, folder / tokenizer, [""])[0])
    except table.WeightError as error:
      problems += [f"{encoder}: {problem}" for problem in error.problems]
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError) as error:
      problems.append(f"{encoder}: {error}")
  if problems:
    raise table.WeightError(str(folder), problems)
  return np.concatenate(parts)


def embed(encoder: Path, tokenizer: Path, texts: list[str]) -> np.ndarray:
  """Projected text embeddings float32[B, E], computed in float32 on one device."""
  settings = json_files.read_object(encoder / "config.json")
  if found := fields.TOWER.check(settings).problems:
    raise table.WeightError(str(encoder / "config.json"), found)
  config = CLIPTextConfig.from_huggingface(settings)
  rows, tensors = clip.text_table(config), tensor_files.open_folder(encoder)
  if found := table.depth_problems(rows, tensors, config.depth):
    raise table.WeightError(str(encoder / "config.json"), found)
  # On one device of this process; every host computes the same values.
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  graphdef, abstract = sharding.abstract_model(lambda: CLIPText(config, rngs=nnx.Rngs(0)), mesh)
  if problems := table.find_problems(tensors, rows, abstract, ignored=clip.IGNORED_BY_TEXT):
    raise table.WeightError(str(encoder), problems)
  params = table.stream(tensors, rows, abstract, str(encoder))
  tokens = clip_tokens.encode(tokenizer, texts, config.max_tokens)
  run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
  return np.asarray(run(params, jnp.asarray(tokens)), np.float32)

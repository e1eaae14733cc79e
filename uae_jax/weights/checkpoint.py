"""The loaded UAE that all readers of weights return, and the dtypes of its parameters."""

from collections.abc import Collection, Mapping
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax import trees
from uae_jax.data.processing import Processor
from uae_jax.layers import lora
from uae_jax.models.captioner import CaptionerConfig
from uae_jax.models.system import SystemConfig
from uae_jax.options.base import Options, option
from uae_jax.options.sampling import EVERYWHERE
from uae_jax.weights import legacy

# Statistics from the config and a constant embedding: float32 for any dtype of the weights.
EXACT = ("vae/latent_scaling", "vae/latent_shift", "pooled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceSettings(Options):
  """Inference settings of a set of weights; the defaults are official, but do not truncate sampling.

  Attributes:
    text_tower: language model that embeds captions for the decoder: "policy" (adapters on) or "reference" (off).
    is_small_world: whether the model was trained only on procedural scenes.
    resolution_px: side of a generated image, in pixels.
    guidance: scale of classifier-free guidance; 1 disables it.
    guidance_interval: noise levels (low, high] with guidance.
    steps: Euler steps per image, or its tokens.
    sampler: "euler", or "tokens" for a model that generates images token by token.
    max_new_tokens: maximum number of tokens per caption.
    shift: shift of the noise schedule toward noise; 1 disables it.
    repetition_penalty: penalty on logits of tokens that the question or the caption already contains; 1 disables it.
    top_k: captions are sampled among the k most likely tokens; 0 disables it.
    top_p: captions are sampled among the most likely tokens whose probabilities sum to p; 1 disables it.
    min_p: captions are sampled among tokens with at least min_p times the highest probability; 0 disables it.
  """

  text_tower: str = option("policy", choices=("policy", "reference"))
  is_small_world: bool = False
  resolution_px: int = option(1024, at_least=1)
  guidance: float = option(5.0, more_than=0)
  guidance_interval: tuple[float, float] = EVERYWHERE
  steps: int = option(40, at_least=1)
  sampler: str = option("euler", choices=("euler", "tokens"))
  max_new_tokens: int = option(512, at_least=1)
  shift: float = option(3.0, more_than=0)
  repetition_penalty: float = option(1.0, more_than=0)
  top_k: int = option(0, at_least=0)
  top_p: float = option(1.0, more_than=0, at_most=1)
  min_p: float = option(0.0, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedUAE:
  """A UAE with weights, as returned by all readers.

  Attributes:
    config: architectures of the models, and their adapters.
    graphdef: structure of the modules; `nnx.merge(graphdef, params)` makes the UAE.
    params: nested dict of arrays, one entry per part, see `models.system.NETS`.
    processor: tokenizer and image processor.
    processor_folder: folder of the processor's files, which exports copy.
    inference: inference settings of the weights.
  """

  config: SystemConfig
  graphdef: nnx.GraphDef
  params: dict[str, Any]
  processor: Processor
  processor_folder: Path
  inference: InferenceSettings


def processor_problems(folder: Path, processor: Processor, captioner: CaptionerConfig) -> list[str]:
  """Why a processor does not fit a captioner: ids beyond the embedding table, another image token or patch size."""
  problems = []
  ids = {
    "largest token id": max(processor.tokenizer.get_vocab().values()),
    "pad_token_id": processor.pad_id,
    "eos_token_id": max(processor.end_ids),
  }
  for name, found in ids.items():
    if not 0 <= found < captioner.vocab_size:
      problems.append(f"{folder}: the {name} is {found}, the embedding table has {captioner.vocab_size} rows")
  for name in ("image_token_id", "patch_size"):
    ours, theirs = getattr(captioner, name), getattr(processor, name)
    if ours != theirs:
      problems.append(f"{folder}: {name} is {ours} in config.json and {theirs} in the processor's files")
  return problems


def typed(
  abstract: Mapping, dtype: str, *, stored: Mapping[str, Any] | None = None, exact: Collection[str] = EXACT
) -> dict:
  """Sets the dtypes of an abstract tree to those that its parameters are loaded in.

  Args:
    abstract: nested dict of `ShapeDtypeStruct`s with shardings.
    dtype: "bfloat16", "float32", or "auto" for the stored dtype. Adapters, `exact` leaves and integers always have the
      stored dtype.
    stored: path -> dtype in the files; absent leaves have the dtype of `abstract`.
    exact: paths of leaves that keep the stored dtype.
  """
  stored = stored or {}

  def leaf_typed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    is_kept = path in exact or lora.is_adapter(path) or not jnp.issubdtype(leaf.dtype, jnp.floating)
    kind = stored.get(path, leaf.dtype) if dtype == "auto" or is_kept else dtype
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(kind), sharding=leaf.sharding)

  return trees.from_items((path, leaf_typed(path, leaf)) for path, leaf in trees.items(abstract))


class OtherModelError(ValueError):
  """Raised for an intact checkpoint of a model with other sizes."""


def read_tree(folder: Path, abstract: Mapping) -> dict:
  """Reads a tree of parameters written by Orbax, including trees with the names of an earlier version.

  Args:
    folder: folder of the tree.
    abstract: nested dict of `ShapeDtypeStruct`s; shapes, dtypes and shardings of the result.

  Raises:
    OtherModelError: the shapes on disk differ from those of `abstract`.
    Exception: the checkpoint is damaged, for which Orbax raises many exception types; see `damage`.
  """
  import orbax.checkpoint as ocp  # Imported late: only checkpoints need it.

  folder = folder.absolute()
  # A checkpointer would wait for the other processes, of which one may have failed before.
  handler = ocp.StandardCheckpointHandler()
  metadata = handler.metadata(folder).tree
  check_shapes(folder, legacy.tree_from_disk(metadata), abstract)
  wanted = ocp.args.StandardRestore(legacy.tree_as_on_disk(abstract, metadata))
  return legacy.tree_from_disk(handler.restore(folder, args=wanted))


def check_shapes(folder: Path, found: Mapping, abstract: Mapping) -> None:
  """Checks that the shapes on disk are those of the model.

  Raises:
    OtherModelError: the shapes differ.
  """
  on_disk = {name: tuple(leaf.shape) for name, leaf in trees.items(found)}
  wanted = {name: tuple(leaf.shape) for name, leaf in trees.items(abstract)}
  different = [name for name in sorted(on_disk | wanted) if on_disk.get(name) != wanted.get(name)]
  if different:
    first = different[0]
    raise OtherModelError(
      f"{folder} holds another model than its model.json describes: {len(different)} parameters differ, the first is "
      f"{first}: {on_disk.get(first, 'absent')} on disk, {wanted.get(first, 'absent')} in the model"
    )


def damage(error: Exception) -> str:
  """Formats an exception that Orbax raised for a damaged checkpoint as one short line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

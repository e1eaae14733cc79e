"""A loaded UAE: what every reader of weights returns and every user of them takes, and the dtypes of its parameters."""

from collections.abc import Collection, Mapping
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from uae_jax import trees
from uae_jax.data.processing import Processor
from uae_jax.layers import lora
from uae_jax.models.uae import UAEConfig
from uae_jax.weights import legacy

# Numbers of the config and a constant: float32 whatever the dtype of the weights.
EXACT = ("vae/latent_scaling", "vae/latent_shift", "pooled")


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
  """How a set of weights is used; the defaults are those of the official inference.

  Attributes:
    text_tower: who encodes captions for the decoder: "policy" (adapters on) or "reference" (adapters off).
    is_small_world: whether the weights know nothing but the procedural scenes.
    resolution_px: side of a generated image.
    guidance: scale of classifier-free guidance; 1 turns it off.
    steps: Euler steps per image.
    max_new_tokens: tokens per caption, at most.
    shift: of the time steps towards noise.
    repetition_penalty: divides the logits of tokens that question or caption already contain; 1 turns it off.
  """

  text_tower: str = "policy"
  is_small_world: bool = False
  resolution_px: int = 1024
  guidance: float = 5.0
  steps: int = 40
  max_new_tokens: int = 512
  shift: float = 3.0
  repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedUAE:
  """A UAE as its readers return it.

  Attributes:
    config: sizes of the five nets and places of the adapters.
    graphdef: structure of the modules; `nnx.merge(graphdef, params)` makes the UAE.
    params: nested dict of arrays, one entry per net of `models.uae.NETS`.
    processor: tokenizer and image processor.
    processor_folder: where the files of the processor are; exports copy them.
    inference: how the weights are used.
  """

  config: UAEConfig
  graphdef: nnx.GraphDef
  params: dict[str, Any]
  processor: Processor
  processor_folder: Path
  inference: InferenceSettings


def typed(
  abstract: Mapping, dtype: str, *, stored: Mapping[str, Any] | None = None, exact: Collection[str] = EXACT
) -> dict:
  """The abstract tree with the dtypes that its parameters are read in.

  Args:
    abstract: nested dict of `ShapeDtypeStruct`s with shardings.
    dtype: "bfloat16", "float32", or "auto" for `stored`. Adapters, `exact` leaves and integers are always as stored.
    stored: path -> dtype in the files; leaves that are absent have the dtype of `abstract`.
    exact: paths that keep their stored dtype.
  """
  stored = stored or {}

  def leaf_typed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    is_kept = path in exact or lora.is_adapter(path) or not jnp.issubdtype(leaf.dtype, jnp.floating)
    kind = stored.get(path, leaf.dtype) if dtype == "auto" or is_kept else dtype
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(kind), sharding=leaf.sharding)

  return trees.from_items((path, leaf_typed(path, leaf)) for path, leaf in trees.items(abstract))


class OtherModelError(ValueError):
  """A checkpoint is whole, but of a model of other sizes."""


def read_tree(folder: Path, abstract: Mapping) -> dict:
  """Reads a tree of parameters that Orbax wrote, also one with the names of an earlier version.

  Args:
    folder: of the tree.
    abstract: `ShapeDtypeStruct`s with shardings; places and dtypes of the result.

  Raises:
    OtherModelError: the shapes on disk are not those of `abstract`.
    Exception: Orbax raises many kinds for a damaged checkpoint; see `damage`.
  """
  folder = folder.absolute()
  metadata = ocp.StandardCheckpointHandler().metadata(folder).tree
  check_shapes(folder, legacy.tree_from_disk(metadata), abstract)
  with ocp.StandardCheckpointer() as checkpointer:
    return legacy.tree_from_disk(checkpointer.restore(folder, legacy.tree_as_on_disk(abstract, metadata)))


def check_shapes(folder: Path, found: Mapping, abstract: Mapping) -> None:
  """Compares the shapes on disk with those of the model.

  Raises:
    OtherModelError: they differ.
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
  """What Orbax says of a damaged checkpoint, on one short line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

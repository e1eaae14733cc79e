"""Our own checkpoint of a whole UAE: `uae.json`, `processor/`, and `params/` by Orbax, which restores onto any mesh."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import types
import typing
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from uae_jax import sharding, trees
from uae_jax.data.processing import Processor
from uae_jax.layers import lora
from uae_jax.models.uae import NETS, UAE, UAEConfig
from uae_jax.weights.export import copy_processor
from uae_jax.weights.official import EXACT, EXTRAS

FORMAT = "uae_jax checkpoint 1"
PARAMS, PROCESSOR = "params", "processor"


def is_native(folder: Path) -> bool:
  return (folder / EXTRAS).exists() and (folder / PARAMS).is_dir()


def save(target: Path, config: UAEConfig, params: Mapping, settings: Mapping[str, Any], processor: Path) -> None:
  """Writes a checkpoint.

  Args:
    target: an empty folder.
    config: sizes.
    params: nested dict of arrays.
    settings: other constructor arguments of `api.UAE`; those that are no JSON are left out.
    processor: folder of the processor's files.
  """
  plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float | bool)}
  dtypes = {path: jnp.dtype(leaf.dtype).name for path, leaf in trees.items(params)}
  content = {"format": FORMAT, "config": dataclasses.asdict(config), "settings": plain, "dtypes": dtypes}
  copy_processor(processor, target / PROCESSOR)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((target / PARAMS).absolute(), {net: params[net] for net in NETS})
  (target / EXTRAS).write_text(json.dumps(content, indent=2) + "\n")


def load(source: Path, dtype: str, mesh: Mesh) -> dict[str, Any]:
  """Constructor arguments of `api.UAE`.

  Args:
    source: what `save` wrote.
    dtype: of the parameters: "bfloat16", "float32", or "auto" for what was saved. Adapters and constants stay.
    mesh: where the parameters live; any mesh will do.

  Raises:
    ValueError: the checkpoint is of another format, or damaged.
  """
  content = json.loads((source / EXTRAS).read_text())
  if content.get("format") != FORMAT:
    raise ValueError(f"{source / EXTRAS}: format {content.get('format')!r}, expected {FORMAT!r}")
  config = from_plain(UAEConfig, content["config"])
  graphdef, abstract = sharding.abstract_model(lambda: UAE(config, rngs=nnx.Rngs(0)), mesh)

  def typed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    keeps = dtype == "auto" or path in EXACT or lora.is_adapter(path)
    kind = content["dtypes"][path] if keeps else dtype
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(kind), sharding=leaf.sharding)

  abstract = trees.from_items((path, typed(path, leaf)) for path, leaf in trees.items(abstract))
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore((source / PARAMS).absolute(), abstract)
  except Exception as error:  # Orbax raises many kinds for a damaged checkpoint; all mean the same here.
    raise ValueError(
      f"{source / PARAMS}: the checkpoint cannot be read ({' '.join(str(error).split())[:300]})"
    ) from error
  processor = Processor.from_folder(source / PROCESSOR)
  return {"graphdef": graphdef, "params": params, "processor": processor} | content["settings"]


def from_plain(kind: Any, value: Any) -> Any:
  """A nested dataclass from what `dataclasses.asdict` and JSON made of it; lists are tuples again."""
  if value is None:
    return None
  if isinstance(kind, types.UnionType):
    kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
  if dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind)
    return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})
  return tuple(value) if isinstance(value, list) else value

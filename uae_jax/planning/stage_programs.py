"""The programs of each stage: the functions that training jits, with abstract arguments sharded as in training.

Nothing is allocated.
"""

from collections.abc import Generator
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from uae_jax import sharding
from uae_jax.embedders.kind import EmbedderSizes, published
from uae_jax.layers.lora import LoRA
from uae_jax.options.buckets import name as name_of
from uae_jax.options.stages import FLOAT
from uae_jax.training import frozen_weights, initial, placement
from uae_jax.training import sizes as sizes_lib
from uae_jax.training.build import Built, build
from uae_jax.training.rl.sde_policy import window_trips
from uae_jax.training.sizes import Sizes
from uae_jax.training.stage import make_init, make_phases, params_before, stage_optimizer, supervised_step
from uae_jax.training.stages import spec

# phase -> settings to change if a program does not fit, besides using more chips.
LEVERS = {
  "step": "raise num_microbatches or lower batch_size",
  "rollout": "lower batch_size, options.num_rollouts or options.max_new_tokens",
  "reward": "raise options.decode_chunks, or lower batch_size or options.num_rollouts",
  "update": "raise updates.num_microbatches, options.logit_chunks (stage 2) or options.replay_chunks (stage 3)",
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One jitted function of a stage with its abstract arguments.

  Attributes:
    stage: name of the stage.
    phase: a key of `LEVERS`.
    function: the jitted function.
    arguments: pytrees of `ShapeDtypeStruct` with shardings.
    is_batch: for each argument, whether it depends on the batch.
    alive_bytes: bytes per chip of all arrays that exist when it starts, whether or not they are arguments.
    trips: trip counts of loops whose length depends on data, see `cost.Counter`.
  """

  stage: str
  phase: str
  function: jax.stages.Wrapped
  arguments: tuple
  is_batch: tuple[bool, ...]
  alive_bytes: float
  trips: tuple[float, ...] = ()


def build_abstract(config, mesh: Mesh, folder: Path) -> Built:
  """Builds the networks of a config without weights; the processor is copied to `folder`.

  Raises:
    ValueError: the model has no known sizes, or there is no processor.
  """
  if sizes_lib.find(config.model).uae is None:
    names = " or ".join(name for name, model in sizes_lib.MODELS.items() if model.uae is not None)
    raise ValueError(f"config.model = {config.model!r} takes its sizes from files: name {names}")
  weights = config.init.weights
  if not config.processor and weights and not Path(weights).is_dir():
    raise ValueError(
      f"config.init.weights = {weights!r}: no folder of this machine. Prompts need the tokenizer and processor files, "
      "no weights: --config.processor=DIR"
    )
  processor = initial.read_processor(config, folder)
  uae = sizes_lib.named_uae(config.model, processor, LoRA(config.lora.rank, config.lora.alpha))
  uae = sizes_lib.rematerialized(uae, config.remat)
  embedders = {kind: embedder_sizes(kind, source, config.model) for kind, source in config.embedders.items() if source}
  return build(config, Sizes(uae, embedders), processor, mesh)


def embedder_sizes(kind: str, source: str, model: str) -> EmbedderSizes:
  """Sizes of an embedder without reading its files: those of the published checkpoint with the folder's name."""
  if source == sizes_lib.FRESH:
    return sizes_lib.fresh_embedder(kind, model)
  return published(kind, Path(source).name)


def bytes_per_device(tree) -> float:
  """Bytes of a tree of sharded arrays on one device."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * item_bytes(leaf.dtype) for leaf in leaves)


def item_bytes(dtype) -> int:
  """Bytes per element; a PRNG key counts as two uint32."""
  return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def placed(shape: tuple[int, ...], dtype, place) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def abstract_batch(config, name: str, built: Built, mesh: Mesh) -> dict:
  """Abstract batch of a stage, as `data.pipeline` makes it, of the largest bucket."""
  rows, place, size = config.section(name).batch_size, sharding.batch_sharding(mesh), config.data.largest_size
  batch = {
    "image": placed((rows, *size, 3), jnp.uint8, place),
    "tokens": placed((rows, config.data.caption_tokens), jnp.int32, place),
    "length": placed((rows,), jnp.int32, place),
    "index": placed((rows,), jnp.int32, place),
  }
  captioner_size = built.processor.resized_size(*size)
  if captioner_size != size:
    batch["captioner_image"] = placed((rows, *captioner_size, 3), jnp.uint8, place)
  return batch


def bucket_tokens(config, built: Built) -> list[dict[str, Any]]:
  """Tokens per image of every bucket, the one that is planned first; empty without buckets."""
  uae, rows = built.sizes.uae, []
  for size in sorted(config.data.image_sizes, key=lambda size: size != config.data.largest_size):
    cells = math.prod(built.processor.resized_size(*size)) // built.processor.cell_px**2
    tokens = {"decoder_tokens": uae.decoder_tokens(*size), "captioner_tokens": cells}
    rows.append({"size": name_of(size), **tokens})
  return rows if config.data.buckets else []


def stage_programs(config, name: str, built: Built, mesh: Mesh) -> Generator[Program, Any, None]:
  """Yields the programs of one step of a stage. `send` the outputs of each, with shardings, to get the next."""
  section = config.section(name)
  optimizer, _, _ = stage_optimizer(section)
  batch = abstract_batch(config, name, built, mesh)
  kept = bytes_per_device(params_before(config, name, built.abstract_params))
  abstract_params = frozen_weights.abstract(section, built.abstract_params)
  if spec.find(name).make_phases is None:
    state = placement.abstract_state(make_init(section, built, optimizer), abstract_params, mesh)
    step = supervised_step(config, name, built, optimizer)
    function = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(state), None))
    alive = kept + bytes_per_device((state, batch))
    yield Program(name, "step", function, (state, batch), (False, True), alive)
    return

  phases = make_phases(config, name, built, optimizer)
  init = make_init(section, built, optimizer, phases)
  state = placement.abstract_state(init, abstract_params, mesh)
  everywhere = sharding.replicated(mesh)
  key = placed((), jax.random.key(0).dtype, everywhere)
  params = jax.tree.map(
    lambda leaf, place: placed(leaf.shape, leaf.dtype, place),
    jax.eval_shape(phases.sampling_params, state),
    shardings_of(abstract_params),
  )
  alive = kept + bytes_per_device((state, batch))
  trajectory = yield Program(
    name,
    "rollout",
    jax.jit(phases.rollout),
    (params, batch, key, placed((), jnp.int32, everywhere)),
    (False, True, True, False),
    alive,
    window_trips(section.options, built.sizes.uae.latents_shape(*config.data.largest_size)),
  )
  rewards, _ = yield Program(
    name,
    "reward",
    jax.jit(phases.reward),
    (params, batch, trajectory, key),
    (False, True, True, True),
    alive + bytes_per_device(trajectory),
  )
  values, _ = jax.eval_shape(phases.advantages, rewards)
  values = jax.tree.map(lambda x: placed(x.shape, x.dtype, sharding.batch_sharding(mesh)), values)
  update = jax.jit(phases.update, donate_argnums=0, out_shardings=(shardings_of(state), None))
  alive += bytes_per_device((trajectory, values))
  yield Program(name, "update", update, (state, batch, trajectory, values), (False, True, True, True), alive)


def settings_of(config, name: str) -> dict[str, Any]:
  """What the figures of a stage belong to: counts per step, cuts, and frozen weights if they are not float."""
  frozen = frozen_weights.mode(config.section(name))
  settings = images_and_captions(config, name) | {"cuts": cuts(config, name)}
  return settings if frozen == FLOAT else settings | {"frozen_weights": frozen}


def images_and_captions(config, name: str) -> dict[str, int]:
  """Counts per step on all chips: "images" trained on or generated, and "captions" sampled."""
  section, sampled = config.section(name), spec.find(name).samples_captions
  rollouts = section.batch_size * getattr(section.options, "images_per_prompt", 1)
  return {"images": rollouts, "captions": section.batch_size * sampled(section.options)}


def cuts(config, name: str) -> dict[str, int]:
  """Settings of a stage that split its work into microbatches or chunks: dotted field -> number."""
  fields: tuple[str, ...] = ("num_microbatches", "updates.num_microbatches")
  fields += tuple(f"options.{part}_chunks" for part in ("decode", "logit", "replay"))
  flat = dataclasses.asdict(config.section(name))
  found = {}
  for field in fields:
    section, _, last = field.rpartition(".")
    values = flat.get(section, {}) if section else flat
    if last in values:
      found[field] = values[last]
  return found


def shardings_of(tree):
  return jax.tree.map(lambda leaf: leaf.sharding, tree)

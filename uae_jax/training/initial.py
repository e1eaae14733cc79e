"""First parameters of a run: from official weights, a stage of another run, or random initialization."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from uae_jax import cloud_storage, embedders, trees
from uae_jax.data import processors
from uae_jax.data.processing import Processor
from uae_jax.embedders.kind import published
from uae_jax.files import naming, whole_folder
from uae_jax.layers.lora import LoRA
from uae_jax.models.system import NETS
from uae_jax.training import checkpoints, processes, restore, validate
from uae_jax.training import sizes as sizes_lib
from uae_jax.training.build import Built
from uae_jax.training.sizes import FRESH, FROM_WEIGHTS, Sizes
from uae_jax.weights import legacy, sources
from uae_jax.weights.checkpoint import LoadedUAE
from uae_jax.weights.export import copy_processor


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """Sizes, processor and loaded weights of a run, before random initialization of the remaining parameters.

  Attributes:
    sizes: sizes of all networks.
    processor: tokenizer and image processor.
    params: parameters loaded from weights, on the mesh; missing leaves are initialized at random.
  """

  sizes: Sizes
  processor: Processor
  params: dict


def read(config, mesh: Mesh, workdir: Path) -> Start:
  """Reads `config.init.weights`, `config.embedders` and the processor; writes sizes and processor to the workdir.

  Args:
    config: sources of weights, embedders and processor; model name, dtype, adapters.
    mesh: mesh over which the weights are sharded.
    workdir: folder of the run.

  Raises:
    ValueError: a folder is missing, or its model is not `config.model`; the message names the folder.
    weights.table.WeightError: tensors are missing, unexpected or have a wrong shape.
  """
  source = read_weights(config.init.weights, config.dtype, mesh) if config.init.weights else None
  processor = read_processor(config, workdir / restore.PROCESSOR)
  lora = LoRA(config.lora.rank, config.lora.alpha)
  params: dict[str, Any] = {"embedders": {}}
  if source is None:
    uae = sizes_lib.named_uae(config.model, processor, lora)
  else:
    uae = source.config
    params |= source.params
    if config.model != FROM_WEIGHTS:
      check_sizes(sizes_lib.named_uae(config.model, processor, lora), uae, config)
    uae = uae.with_adapters(lora)
  uae = sizes_lib.rematerialized(uae, config.remat)
  validate.check_system(config, uae)
  sized = {}
  for kind, folder in config.embedders.items():
    if folder == FRESH:
      sized[kind] = sizes_lib.fresh_embedder(kind, config.model)
    elif folder:
      embedder = embedders.load(kind, folder, dtype=config.dtype, mesh=mesh)
      sized[kind] = embedder.sizes
      params["embedders"][kind] = embedder.params
  sizes = Sizes(uae, sized)
  processes.on_first(lambda: sizes_lib.write(workdir, sizes))
  return Start(sizes, processor, params)


def read_sizes(config, folder: Path) -> tuple[Sizes, Processor]:
  """Reads sizes and processor of a run without its weights.

  An embedder with weights has the sizes of the published checkpoint with the name of its folder.

  Args:
    config: as for `read`.
    folder: receives a copy of the processor.

  Raises:
    ValueError: a folder is missing, or its model is not `config.model`.
    weights.table.WeightError: tensors are missing, unexpected or have a wrong shape.
  """
  weights = weights_folder(config.init.weights) if config.init.weights else None
  write_run_processor(config, folder)
  processor = processors.read(folder)
  lora = LoRA(config.lora.rank, config.lora.alpha)
  uae = sources.config(weights).with_adapters(lora) if weights else None
  if uae is None or config.model != FROM_WEIGHTS:
    named = sizes_lib.named_uae(config.model, processor, lora)
    if uae is not None:
      check_sizes(named, uae, config)
    uae = uae or named
  validate.check_system(config, uae)
  embedders = {
    kind: sizes_lib.fresh_embedder(kind, config.model) if source == FRESH else published(kind, Path(source).name)
    for kind, source in config.embedders.items()
    if source
  }
  return Sizes(sizes_lib.rematerialized(uae, config.remat), embedders), processor


def fetched_input(field: str, path: str) -> Path:
  """Returns the path on this machine of a field that may name a folder in a bucket.

  Raises:
    ValueError: the bucket has no such folder or cannot be read.
  """
  try:
    return Path(cloud_storage.fetched(path))
  except (ValueError, FileNotFoundError) as error:
    raise ValueError(f"config.{field} = {error}") from error


def weights_folder(folder: str) -> Path:
  """Returns the path of `config.init.weights` on this machine.

  Raises:
    ValueError: there is no such folder.
  """
  path = fetched_input("init.weights", folder)
  if not path.is_dir():
    raise ValueError(f"config.init.weights = {folder!r}: no such folder")
  return path


def read_weights(folder: str, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Reads `config.init.weights`: an official folder, or an export of `uae-jax convert --to orbax`."""
  return sources.read(weights_folder(folder), dtype, mesh)


def read_processor(config, folder: Path) -> Processor:
  """Reads the run's own copy of the processor; the first call makes the copy.

  Its source is `config.processor`, else `config.init.weights`, else the built-in processor of the model.

  Raises:
    ValueError: there is no source.
  """
  processes.on_first(lambda: write_run_processor(config, folder))
  return processors.read(folder)


def write_run_processor(config, folder: Path) -> None:
  """Writes the run's copy of the processor atomically, if it does not exist."""
  if folder.exists():
    return
  write_processor = sizes_lib.find(config.model).write_processor
  with naming(folder), whole_folder(folder) as content:
    if config.processor:
      copy_processor(fetched_input("processor", config.processor), content)
    elif config.init.weights:
      copy_processor(sources.processor_folder(weights_folder(config.init.weights)), content)
    elif write_processor is not None:
      write_processor(content)
    else:
      raise ValueError(f"config.processor is empty: {config.model} needs the folder of its tokenizer and processor")


def check_sizes(wanted, found, config) -> None:
  """Checks that the weights have the sizes of `config.model`; adapters may differ.

  Raises:
    ValueError: a size differs; the message names it.
  """
  if type(wanted) is not type(found):
    raise ValueError(
      f"config.model = {config.model!r} is a {type(wanted).__name__}, but {config.init.weights} holds a "
      f"{type(found).__name__}"
    )
  for net in (name for name in NETS if dataclasses.is_dataclass(getattr(wanted, name, None))):
    other = dataclasses.asdict(getattr(found, net))
    for name, value in trees.items(dataclasses.asdict(getattr(wanted, net))):
      actual = dict(trees.items(other)).get(name)
      if value != actual and not name.endswith(("unroll", "remat", "image_token_id")):
        raise ValueError(
          f"config.model = {config.model!r} has {net} {name} = {value}, but {config.init.weights} has {actual}: "
          f"name the right model, or {FROM_WEIGHTS!r} to take what is there"
        )


def make_params(config, built: Built, start: Start) -> dict:
  """Makes the first parameters, sharded like `built.abstract_params`.

  Leaves that are in no file (adapters for plain folders, fresh embedders) are drawn from `config.seed`.

  Raises:
    ValueError: `config.init.checkpoint` cannot be read or has other sizes.
  """
  if config.init.checkpoint:
    return read_checkpoint(config.init.checkpoint, built.abstract_params)
  given = dict(trees.items(start.params))
  missing = [path for path, _ in trees.items(built.abstract_params) if path not in given]
  shardings = dict(trees.items(built.shardings))

  def fresh(key: jax.Array) -> dict:
    leaves = dict(trees.items(built.init(key)))
    return {path: leaves[path] for path in missing}

  # Missing leaves are the only outputs, so XLA computes no others.
  made = jax.jit(fresh, out_shardings={path: shardings[path] for path in missing})(jax.random.key(config.seed))
  return trees.from_items((path, given.get(path, made.get(path))) for path, _ in trees.items(built.abstract_params))


def read_checkpoint(source: str, abstract: dict) -> dict:
  """Reads all parameters of a finished stage of another run, which may be of an earlier version.

  Args:
    source: "WORKDIR:STAGE", or "WORKDIR" for its newest finished stage.
    abstract: `ShapeDtypeStruct`s with the shardings of the result.

  Raises:
    ValueError: there is no such run or finished stage, or its parameters are damaged or have other sizes.
  """
  return checkpoints.read_params(find_checkpoint(source), abstract)


def find_checkpoint(source: str) -> Path:
  """Returns the folder of the parameters that `config.init.checkpoint` names.

  Raises:
    ValueError: there is no such run or finished stage.
  """
  workdir, _, stage = source.partition(":")
  folder = Path(workdir) / "checkpoints"
  stages = (
    [legacy.stage_folder(folder, stage)]
    if stage
    else sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
  )
  finished = [step for path in stages for step in restore.finished_steps(path)]
  if not finished:
    raise ValueError(f"config.init.checkpoint = {source!r}: no finished stage there (WORKDIR:STAGE)")
  return finished[0]

"""What a run starts from: official weights, a stage of another run, or fresh random numbers."""

import dataclasses
from pathlib import Path
import shutil
from typing import Any

import jax
from jax.sharding import Mesh

from uae_jax import embedders, trees
from uae_jax.data.processing import Processor
from uae_jax.layers.lora import LoRA
from uae_jax.training import processes, restore
from uae_jax.training import sizes as sizes_lib
from uae_jax.training.build import Built
from uae_jax.training.sizes import FRESH, FROM_WEIGHTS, Sizes
from uae_jax.weights import legacy, sources
from uae_jax.weights.checkpoint import LoadedUAE, read_tree
from uae_jax.weights.export import copy_processor


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """What is known before anything is initialized.

  Attributes:
    sizes: of all nets.
    processor: tokenizer and image processor.
    params: what the weights hold, on the mesh; absent leaves are drawn at random.
  """

  sizes: Sizes
  processor: Processor
  params: dict


def read(config, mesh: Mesh, workdir: Path) -> Start:
  """Reads `config.init.weights`, `config.embedders` and the processor; keeps sizes and processor in the workdir.

  Args:
    config: of the run.
    mesh: where the weights go.
    workdir: of the run.

  Raises:
    ValueError: a folder is missing or of another model than `config.model`; the message names it.
    weights.table.WeightError: tensors are missing, unexpected or misshapen.
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
    uae = sizes_lib.with_adapters(uae, lora)
  uae = sizes_lib.rematerialized(uae, config.remat)
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


def read_weights(folder: str, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Reads `config.init.weights`: an official folder, or what `uae-jax convert --to orbax` wrote."""
  path = Path(folder)
  if not path.is_dir():
    raise ValueError(f"config.init.weights = {folder!r}: no such folder")
  return sources.read(path, dtype, mesh)


def read_processor(config, folder: Path) -> Processor:
  """The run's own copy of the processor, made at first use: from `config.processor`, from the weights, or the model's
  own.

  Raises:
    ValueError: nothing says which.
  """
  processes.on_first(lambda: write_run_processor(config, folder))
  return Processor.from_folder(folder)


def write_run_processor(config, folder: Path) -> None:
  """Makes the copy if there is none, whole or not at all."""
  if folder.exists():
    return
  temporary = folder.with_name(f"{folder.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  write_processor = sizes_lib.find(config.model).write_processor
  if config.processor:
    copy_processor(Path(config.processor), temporary)
  elif config.init.weights:
    copy_processor(sources.processor_folder(Path(config.init.weights)), temporary)
  elif write_processor is not None:
    write_processor(temporary)
  else:
    raise ValueError(f"config.processor is empty: {config.model} needs the folder of its tokenizer and processor")
  temporary.rename(folder)


def check_sizes(wanted, found, config) -> None:
  """Raises `ValueError` where the weights are of another model than `config.model`; adapters may differ."""
  plain = {name: dataclasses.asdict(getattr(wanted, name)) for name in ("captioner", "decoder", "vae")}
  for net, fields in plain.items():
    other = dataclasses.asdict(getattr(found, net))
    for name, value in trees.items(fields):
      actual = dict(trees.items(other)).get(name)
      if value != actual and not name.endswith(("unroll", "remat", "image_token_id")):
        raise ValueError(
          f"config.model = {config.model!r} has {net} {name} = {value}, but {config.init.weights} has {actual}: "
          f"name the right model, or {FROM_WEIGHTS!r} to take what is there"
        )


def make_params(config, built: Built, start: Start) -> dict:
  """The first parameters, placed as `built.abstract_params` says.

  Leaves that no file holds (adapters of plain folders, fresh embedders) are drawn from `config.seed`.

  Raises:
    ValueError: `config.init.checkpoint` cannot be read or is of other sizes.
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
  """All parameters that a finished stage of another run left, also of a run of an earlier version.

  Args:
    source: "WORKDIR:STAGE"; of "WORKDIR" alone the newest finished stage.
    abstract: `ShapeDtypeStruct`s with shardings.

  Raises:
    ValueError: no such run or stage, or parameters of other sizes.
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
  return read_tree(finished[0], abstract)

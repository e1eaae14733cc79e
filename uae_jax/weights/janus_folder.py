"""A folder of Janus-Pro: transformers' (deepseek-community/Janus-Pro-1B) or DeepSeek's (deepseek-ai/Janus-Pro-1B).

Both are read; transformers' is written, with adapters merged.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any
import warnings

from flax import nnx
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from uae_jax import json_files, sharding
from uae_jax.data import processor_files
from uae_jax.data.janus_processing import JanusProcessor
from uae_jax.models.janus.model import JanusConfig
from uae_jax.models.janus.system import JanusSystemConfig
from uae_jax.plain import from_plain, to_plain
from uae_jax.weights import fields, huggingface_configs, janus, torch_archives
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE, processor_problems, typed
from uae_jax.weights.export import Dump, copy_processor
from uae_jax.weights.official import EXTRAS
from uae_jax.weights.table import Row, WeightError, expand, find_problems, stream
from uae_jax.weights.tensor_files import open_folder, spec_of, write_folder

TRANSFORMERS, DEEPSEEK = "janus", "multi_modality"
# Generation by the official code: no truncation, guidance 5.
SETTINGS = InferenceSettings(guidance=5.0, sampler="tokens", shift=1.0)
STEM, TORCH_STEM = "model", "pytorch_model"


def is_janus(folder: Path) -> bool:
  """Whether the folder's `config.json` is that of a Janus."""
  kind = json_files.read_object(folder / "config.json", default={}).get("model_type")
  return kind in (TRANSFORMERS, DEEPSEEK)


def read_config(folder: Path) -> JanusSystemConfig:
  """Reads the architecture of a folder.

  Raises:
    WeightError: the config describes an unsupported architecture; all problems are listed.
  """
  file = folder / "config.json"
  settings = json_files.read_object(file)
  found = fields.check_janus(settings)
  if found.unknown:
    warnings.warn(f"{file}: fields that are not known were ignored: {', '.join(found.unknown)[:500]}", stacklevel=4)
  problems = [f"{file}: {problem}" for problem in found.problems]
  if not problems:
    try:
      return JanusSystemConfig(_architecture(folder, settings))
    except (ValueError, TypeError, ArithmeticError, AttributeError, KeyError) as error:
      problems.append(f"{file}: {error}")
  raise WeightError(str(folder), problems)


def _architecture(folder: Path, settings: Mapping[str, Any]) -> JanusConfig:
  if settings["model_type"] == TRANSFORMERS:
    return JanusConfig.from_huggingface(settings)
  # Only the tokenizer knows the id of the placeholder.
  return JanusConfig.from_deepseek(settings, JanusProcessor.from_folder(folder).image_token_id)


def load(folder: Path, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Loads a folder, with parameters sharded over `mesh`; all parts are checked before any tensor is read.

  Args:
    folder: the folder.
    dtype: dtype of the parameters: "bfloat16", "float32", or "auto" for that of the files.
    mesh: mesh that the parameters are sharded over.

  Raises:
    ValueError: a file is missing or damaged.
    WeightError: tensors or settings are missing, unexpected, or have the wrong shape or type.
  """
  config = read_config(folder)
  processor = JanusProcessor.from_folder(folder)
  is_theirs = json_files.read_object(folder / "config.json")["model_type"] == TRANSFORMERS
  if is_theirs:
    table, ignored = janus.table(config.captioner), dict(janus.IGNORED)
    if not config.captioner.language.ties_embeddings:
      ignored.pop(r"^lm_head\.weight$")
  else:
    table, ignored = janus.deepseek_table(config.captioner), janus.IGNORED | janus.IGNORED_IN_DEEPSEEK
  tensors = _open(folder)
  graphdef, abstract = sharding.abstract_model(lambda: config.build(nnx.Rngs(0)), mesh)
  problems = processor_problems(folder, processor, config.captioner)
  if processor.image_px != (side := config.captioner.vision.image_px):
    problems.append(
      f"{folder}: images have {processor.image_px} pixels in the processor's files, {side} in config.json"
    )
  problems += find_problems(tensors, table, abstract["captioner"], ignored=ignored)
  if problems:
    raise WeightError(str(folder), problems)
  abstract = typed(abstract, dtype, stored=_stored(tensors, table, abstract) if dtype == "auto" else None)
  params = {"captioner": stream(tensors, table, abstract["captioner"], str(folder))}
  return LoadedUAE(config, graphdef, params, processor, folder, _inference(folder, config))


def _open(folder: Path) -> Mapping[str, np.ndarray]:
  """The tensors of safetensors files, or of the `torch.save` archives that DeepSeek publishes."""
  index, single = folder / f"{TORCH_STEM}.bin.index.json", folder / f"{TORCH_STEM}.bin"
  if any(folder.glob("*.safetensors")) or not (index.exists() or single.exists()):
    return open_folder(folder, STEM)
  names = sorted(set(json_files.read_object(index).get("weight_map", {}).values())) if index.exists() else [single.name]
  tensors: dict[str, np.ndarray] = {}
  for name in names:
    if not isinstance(name, str) or name != Path(name).name or not (folder / name).exists():
      raise ValueError(f"{index} names a file that is not there: {name!r:.100}")
    tensors |= torch_archives.read(folder / name)
  return tensors


def _stored(tensors: Mapping, table: tuple[Row, ...], abstract: Mapping) -> dict[str, np.dtype]:
  """Path of a parameter -> dtype of its tensors."""
  kinds: dict[str, np.dtype] = {}
  for match in expand(table, abstract["captioner"]):
    kind = spec_of(tensors, match.names[0]).dtype
    kinds |= {f"captioner/{path}": kind for path in match.paths if jnp.issubdtype(kind, jnp.floating)}
  return kinds


def _inference(folder: Path, config: JanusSystemConfig) -> InferenceSettings:
  """The settings of an export, else the official ones and those of `generation_config.json`."""
  extras = json_files.read_object(folder / EXTRAS, default={})
  if extras:
    return from_plain(InferenceSettings, extras, str(folder / EXTRAS))
  return dataclasses.replace(
    SETTINGS,
    resolution_px=config.captioner.vision.image_px,
    steps=config.captioner.num_image_tokens,
    repetition_penalty=processor_files.repetition_penalty(folder),
    **processor_files.kept_tokens(folder),
  )


def write(target: Path, loaded: LoadedUAE, *, merged: bool, **options) -> None:
  """Writes a folder that transformers and `UAE.load` read, with adapters merged into the weights.

  Args:
    target: an empty folder.
    loaded: the system; embedders in its parameters are not written.
    merged: must be True.
    **options: those of `export.write_uae`; not used.

  Raises:
    ValueError: the adapters should be written alone.
  """
  del options
  if not merged:
    raise ValueError("adapters of a Janus are written merged (--to huggingface) or with the whole model (--to orbax)")
  config = loaded.config
  assert isinstance(config, JanusSystemConfig)
  captioner, adapters = config.captioner, config.captioner_lora
  copy_processor(loaded.processor_folder, target)
  params = loaded.params["captioner"]
  scale = adapters.alpha / adapters.rank if adapters else None
  write_folder(target, STEM, Dump(params, janus.table(captioner), scale))
  dtype = np.dtype(params["language"]["embedding"].dtype).name
  content = huggingface_configs.janus(captioner, dtype) | {
    "bos_token_id": loaded.processor.tokenizer.bos_token_id,
    "eos_token_id": loaded.processor.end_ids[0],
    "pad_token_id": loaded.processor.pad_id,
  }
  (target / "config.json").write_text(json.dumps(content, indent=2) + "\n")
  settings = dataclasses.replace(loaded.inference, text_tower="policy")
  (target / EXTRAS).write_text(json.dumps(to_plain(settings), indent=2) + "\n")

"""A folder of Janus-Pro: transformers' (deepseek-community/Janus-Pro-1B) or DeepSeek's (deepseek-ai/Janus-Pro-1B).

Both are read; transformers' is written, with adapters merged.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
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
from uae_jax.weights import fields, huggingface_configs, janus
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE, processor_problems, typed
from uae_jax.weights.export import Dump, copy_processor
from uae_jax.weights.folder_adapters import ADAPTER_CONFIG
from uae_jax.weights.official import EXTRAS
from uae_jax.weights.table import Row, WeightError, expand, find_problems, stream
from uae_jax.weights.tensor_files import Renamed, open_archives, open_folder, spec_of, write_folder
from uae_jax.weights.tied_head import ties_embeddings

TRANSFORMERS, DEEPSEEK = "janus", "multi_modality"
# Generation by the official code: no truncation, guidance 5.
SETTINGS = InferenceSettings(guidance=5.0, sampler="tokens", shift=1.0)
STEM, TORCH_STEM = "model", "pytorch_model"


def is_janus(folder: Path) -> bool:
  """Whether the folder's `config.json` is that of a Janus."""
  kind = json_files.read_object(folder / "config.json", default={}).get("model_type")
  return kind in (TRANSFORMERS, DEEPSEEK)


def read_config(folder: Path) -> JanusSystemConfig:
  """Reads the architecture of a folder; of its tensors, only a head that the config ties to the embeddings.

  Raises:
    ValueError: a file is missing or damaged.
    WeightError: the config describes an unsupported architecture, or another than that of the tensors; all problems are
      listed.
  """
  return _open(folder)[0]


def _open(folder: Path) -> tuple[JanusSystemConfig, Renamed]:
  """The architecture of a folder and its tensors; see `read_config` for errors."""
  file = folder / "config.json"
  settings = json_files.read_object(file)
  found = fields.check_janus(settings)
  if found.unknown:
    warnings.warn(f"{file}: fields that are not known were ignored: {', '.join(found.unknown)[:500]}", stacklevel=5)
  problems = [f"{file}: {problem}" for problem in found.problems]
  if (adapters := folder / ADAPTER_CONFIG).exists():
    problems.append(f"{adapters}: adapters beside a Janus are not read: merge them into its weights")
  if problems:
    raise WeightError(str(folder), problems)
  is_deepseek = settings.get("model_type") == DEEPSEEK
  try:
    if is_deepseek:
      # Only the tokenizer knows the id of the placeholder.
      config = JanusConfig.from_deepseek(settings, JanusProcessor.from_folder(folder).image_token_id)
    else:
      config = JanusConfig.from_huggingface(settings)
  except (ValueError, TypeError, ArithmeticError, AttributeError, KeyError) as error:
    raise WeightError(str(folder), [f"{file}: {error}"]) from error
  tensors = Renamed()
  tensors.add(_tensors(folder), str)
  if problems := janus.size_problems(config, tensors, is_deepseek=is_deepseek):
    raise WeightError(str(folder), [f"{file}: {problem}" for problem in problems])
  if config.language.ties_embeddings:
    ties = ties_embeddings(tensors, *janus.language_names(is_deepseek=is_deepseek), folder)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, ties_embeddings=ties))
  return JanusSystemConfig(config), tensors


def _tensors(folder: Path) -> Mapping[str, np.ndarray]:
  """The tensors of safetensors files, or of the `torch.save` archives that DeepSeek publishes."""
  names = (f"{TORCH_STEM}.bin", f"{TORCH_STEM}.bin.index.json")
  if any(folder.glob("*.safetensors")) or not any((folder / name).exists() for name in names):
    return open_folder(folder, STEM)
  return open_archives(folder, TORCH_STEM)


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
  config, tensors = _open(folder)
  processor = JanusProcessor.from_folder(folder)
  if json_files.read_object(folder / "config.json").get("model_type") == DEEPSEEK:
    table, ignored = janus.deepseek_table(config.captioner), janus.IGNORED | janus.IGNORED_IN_DEEPSEEK
  else:
    table, ignored = janus.table(config.captioner), dict(janus.IGNORED)
  if not config.captioner.language.ties_embeddings:
    ignored.pop(janus.TIED_HEAD)
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
    guidance=processor_files.guidance_scale(folder) or SETTINGS.guidance,
    repetition_penalty=processor_files.repetition_penalty(folder, others=("guidance_scale",)),
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

"""Loads a UAE from the official UAE folder, or from plain Qwen2.5-VL and SD3.5 folders in the same layout.

```
llm_model/   Qwen2.5-VL, its tokenizer and processor; UAE's connector as projector.*
llm_lora/    (optional) a full state with adapters, or a PEFT adapter; its tensors replace those of llm_model
dit/         SD3Transformer2DModel; if absent, SD3/transformer/ is used
dit_lora/    (optional) a PEFT adapter
SD3/         vae/, scheduler/, and the two CLIP text towers with their tokenizers
uae.json     (optional) written by our exports: settings that the other files cannot express
```
Source: the loading code of PKU-YuanGroup/UAE; PEFT 0.17 and 0.21 for the names and the scale of adapters.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any, TypeVar
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from uae_jax import json_files, sharding
from uae_jax.data import processor_files
from uae_jax.data.processing import Processor
from uae_jax.models.connector import Connector, ConnectorConfig
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.uae import UAE, UAEConfig
from uae_jax.models.vae import AutoencoderKLConfig
from uae_jax.plain import from_plain
from uae_jax.weights import connector, fields, mmdit, pooled, qwen25_vl
from uae_jax.weights import vae as vae_weights
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE, processor_problems, typed
from uae_jax.weights.folder_adapters import ADAPTER_CONFIG, ADAPTER_STEM, read_captioner, read_decoder
from uae_jax.weights.table import Row, WeightError, find_problems, stream
from uae_jax.weights.tensor_files import Renamed, Safetensors, open_file, open_folder, spec_of
from uae_jax.weights.tied_head import ties_embeddings

T = TypeVar("T")
Check = Callable[[Mapping], fields.Findings]
EXTRAS = "uae.json"
# The connector of an export without base models; replaces the connector in llm_model.
CONNECTOR = "projector.safetensors"
DIFFUSERS_STEM = "diffusion_pytorch_model"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Part:
  """One model of the UAE: its name in the tree of parameters, its tensors, and the weight table that maps them."""

  name: str
  tensors: Mapping[str, np.ndarray]
  table: tuple[Row, ...]
  ignored: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Folders:
  """The folders of the parts of a UAE."""

  root: Path

  @property
  def language(self) -> Path:
    return self.root / "llm_model"

  @property
  def language_adapters(self) -> Path:
    return self.root / "llm_lora"

  @property
  def decoder(self) -> Path:
    own = self.root / "dit"
    return own if own.is_dir() or not (self.diffusion / "transformer").is_dir() else self.diffusion / "transformer"

  @property
  def decoder_adapters(self) -> Path:
    return self.root / "dit_lora"

  @property
  def diffusion(self) -> Path:
    return self.root / "SD3"


def load_official(path: str | Path, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Loads an official or plain folder, with parameters sharded over `mesh`.

  Every tensor is read once, directly to its devices. All parts are checked before any tensor is read, and all problems
  are reported together.

  Args:
    path: the folder.
    dtype: dtype of the parameters: "bfloat16", "float32", or "auto" for that of the files. Adapters are float32, as in
      PEFT, except with "auto".
    mesh: mesh that the parameters are sharded over.

  Raises:
    FileNotFoundError: the folder has neither layout.
    WeightError: parts, tensors or settings are missing, unexpected, or have the wrong shape or type.
  """
  folders = Folders(Path(path))
  if not folders.language.is_dir():
    raise FileNotFoundError(
      f"{path}: neither a run of uae-jax (config.json and checkpoints/) nor a UAE folder (llm_model/, dit/, SD3/)"
    )
  reader = Reader(folders)
  reader.check()
  graphdef, abstract = sharding.abstract_model(lambda: UAE(reader.config, rngs=nnx.Rngs(0)), mesh)
  parts, inference = reader.parts(), reader.inference()
  reader.check()
  abstract = typed(abstract, dtype, stored=_stored_dtypes(parts) if dtype == "auto" else None)
  missing_connector = reader.has_no_connector
  for part in parts:
    try:
      reader.problems += find_problems(part.tensors, part.table, abstract[part.name], ignored=part.ignored)
    except WeightError as error:
      reader.problems += error.problems
  reader.check()
  condition = pooled.read(folders.diffusion)
  if condition.shape != abstract["pooled"].shape:
    raise WeightError(str(path), [f"pooled embedding of {condition.shape}, dit wants {abstract['pooled'].shape}"])
  params: dict[str, Any] = {
    part.name: stream(part.tensors, part.table, abstract[part.name], f"{path} ({part.name})") for part in parts
  }
  if missing_connector:
    warnings.warn(
      f"{path}: no projector.* in llm_model or llm_lora: the connector starts from random numbers, train it",
      stacklevel=5,
    )
    params["connector"] = _fresh_connector(reader.config.connector, abstract["connector"])
  params["pooled"] = jax.make_array_from_callback(
    condition.shape, abstract["pooled"].sharding, lambda index: condition[index]
  )
  assert reader.processor is not None  # otherwise it is one of the problems
  return LoadedUAE(reader.config, graphdef, params, reader.processor, folders.language, inference)


class Reader:
  """Reads the small files of a folder (configs, headers, processor), and collects their errors in `problems`."""

  def __init__(self, folders: Folders):
    self.folders = folders
    self.problems: list[str] = []
    self.extras = self._attempt(lambda: json_files.read_object(folders.root / EXTRAS, default={})) or {}
    self.language, adapter_names = Renamed(), list[str]()
    self.language.add(self._open(folders.language, "model"), qwen25_vl.canonical)
    if folders.language_adapters.is_dir():
      stem = ADAPTER_STEM if (folders.language_adapters / ADAPTER_CONFIG).exists() else "model"
      tensors = self._open(folders.language_adapters, stem)
      self.language.add(tensors, qwen25_vl.canonical)
      adapter_names = list(tensors)
    if (folders.root / CONNECTOR).exists():
      found = self._attempt(lambda: open_file(folders.root / CONNECTOR))
      self.language.add(found or {}, qwen25_vl.canonical)
    self.decoder = self._open(folders.decoder, DIFFUSERS_STEM)
    self.decoder_adapters = Renamed()
    self.vae = self._open(folders.diffusion / "vae", DIFFUSERS_STEM)

    captioner = self._config(Qwen25VLConfig.from_huggingface, folders.language, fields.check_qwen)
    captioner = self._sized(captioner, qwen25_vl.size_problems, self.language, folders.language)
    decoder = self._config(MMDiTConfig.from_huggingface, folders.decoder, fields.MMDIT.check)
    decoder = self._sized(decoder, mmdit.size_problems, self.decoder, folders.decoder)
    vae = self._config(AutoencoderKLConfig.from_huggingface, folders.diffusion / "vae", fields.VAE.check)
    vae = self._sized(vae, vae_weights.size_problems, self.vae, folders.diffusion / "vae")
    self.processor = self._attempt(lambda: Processor.from_folder(folders.language))
    self._uae: UAEConfig | None = None
    if captioner and self.processor:
      self.problems += processor_problems(folders.language, self.processor, captioner)
      captioner = self._attempt(functools.partial(self._completed, captioner))
    if captioner and decoder and vae:
      targets = qwen25_vl.adapter_targets(captioner, self.language)
      captioner_lora = decoder_lora = None
      if targets is not None:
        captioner_lora = read_captioner(folders.language_adapters, targets, self.language, adapter_names, self.problems)
      if folders.decoder_adapters.is_dir():
        adapters = self._attempt(lambda: read_decoder(folders.decoder_adapters, decoder, self.problems))
        decoder_lora, self.decoder_adapters = adapters or (None, Renamed())
      masks = self.extras.get("mask_context", False)
      if not isinstance(masks, bool):
        self.problems.append(f"{folders.root / EXTRAS}: mask_context is {masks!r:.60}, expected true or false")
      self._uae = UAEConfig(
        captioner=captioner,
        connector=self._connector_config(captioner, decoder),
        decoder=decoder,
        vae=vae,
        captioner_lora=captioner_lora,
        decoder_lora=decoder_lora,
        mask_context=bool(masks),
      )

  @property
  def config(self) -> UAEConfig:
    """Config of the UAE; exists if `check` passes."""
    assert self._uae is not None  # otherwise a config could not be read, which is one of the problems
    return self._uae

  @property
  def has_no_connector(self) -> bool:
    return not any(name.startswith("projector.") for name in self.language)

  def check(self) -> None:
    """Raises `WeightError` if there have been any problems so far."""
    if self.problems:
      raise WeightError(str(self.folders.root), self.problems)

  def parts(self) -> list[Part]:
    """All models of the UAE, the connector only if the files have one; without the pooled conditioning."""
    config, captioner = self.config, self.config.captioner
    assert isinstance(captioner, Qwen25VLConfig)  # the only kind that these folders hold
    captioner_table = qwen25_vl.table(captioner)
    if config.captioner_lora:
      captioner_table += qwen25_vl.adapter_table(captioner, config.captioner_lora)
    ignored = dict(qwen25_vl.IGNORED)
    if not captioner.language.ties_embeddings:
      ignored.pop(r"^lm_head\.weight$")
    decoder, decoder_table = Renamed(), mmdit.table(config.decoder)
    for tensors in (self.decoder, self.decoder_adapters):
      decoder.add(tensors, str)
    if config.decoder_lora:
      decoder_table += mmdit.adapter_table(config.decoder, config.decoder_lora)
    statistics = vae_weights.latent_statistics(config.vae)
    for name in statistics:
      if name in self.extras:
        values = self._attempt(functools.partial(np.asarray, self.extras[name], np.float32))
        statistics[name] = statistics[name] if values is None else values
    vae = Renamed()
    vae.add(self.vae, str)
    vae.add(statistics, str)
    parts = [
      Part("captioner", self.language, captioner_table, ignored),
      Part("connector", self.language, connector.table(config.connector), connector.IGNORED),
      Part("decoder", decoder, decoder_table, mmdit.IGNORED),
      Part("vae", vae, vae_weights.table(config.vae), vae_weights.IGNORED),
    ]
    return [part for part in parts if part.name != "connector" or not self.has_no_connector]

  def inference(self) -> InferenceSettings:
    """Inference settings from `uae.json` and the configs; the official defaults where they set nothing."""
    folders, extras = self.folders, self.extras
    side = self.config.decoder.sample_size * self.config.vae.downsampling
    others = {"mask_context", *vae_weights.latent_statistics(self.config.vae)}
    given = {name: value for name, value in extras.items() if name not in others}
    given.setdefault("resolution_px", side)
    file = folders.diffusion / "scheduler" / "scheduler_config.json"
    if file.exists():
      # An absent shift is that of diffusers' class.
      shift = self._checked(file, fields.SCHEDULER.check).get("shift") or 1.0
      given["shift"] = shift if isinstance(shift, int | float) else 1.0
      if given["shift"] <= 0:
        self.problems.append(f"{file}: shift is {shift}, expected a positive number")
    given["repetition_penalty"] = self._attempt(lambda: processor_files.repetition_penalty(folders.language)) or 1.0
    kept = self._attempt(lambda: processor_files.kept_tokens(folders.language)) or {}
    # What `uae.json` says is of an export, whose `generation_config.json` may say nothing.
    given = kept | given
    made = self._attempt(lambda: from_plain(InferenceSettings, given, str(folders.root / EXTRAS)))
    return made or InferenceSettings()

  def _attempt(self, make: Callable[[], T]) -> T | None:
    """Returns `make()`; if it fails, records the problem and returns None."""
    try:
      return make()
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError, IndexError) as error:
      text = f"missing {error}" if isinstance(error, KeyError) else str(error)
      self.problems.append(text)
      return None

  def _open(self, folder: Path, stem: str) -> Safetensors:
    return self._attempt(lambda: open_folder(folder, stem)) or Safetensors([])

  def _checked(self, file: Path, check: Check) -> dict[str, Any]:
    """The content of a config; records what is not supported, and names in a warning what is not known."""
    settings = self._attempt(lambda: json_files.read_object(file))
    if settings is None:
      return {}
    found = check(settings)
    self.problems += [f"{file}: {problem}" for problem in found.problems]
    if found.unknown:
      warnings.warn(f"{file}: fields that are not known were ignored: {', '.join(found.unknown)[:500]}", stacklevel=6)
    return settings

  def _config(
    self, make: Callable[[Mapping], T], folder: Path, check: Callable[[Mapping], fields.Findings]
  ) -> T | None:
    """Reads `config.json`; if anything in it is wrong, records the problem and returns None."""
    file, before = folder / "config.json", len(self.problems)
    settings = self._checked(file, check)
    if len(self.problems) > before:
      return None
    try:
      return make(settings)
    except KeyError as error:
      self.problems.append(f"{file}: no field {error}")
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
      self.problems.append(f"{file}: {error}")
    return None

  def _sized(
    self, config: T | None, check: Callable[[T, Mapping], list[str]], tensors: Mapping, folder: Path
  ) -> T | None:
    """The config, if its numbers of layers are those of the tensors; they are expanded only then."""
    found = check(config, tensors) if config is not None and len(tensors) else []
    self.problems += [f"{folder / 'config.json'}: {problem}" for problem in found]
    return None if found else config

  def _completed(self, captioner: Qwen25VLConfig) -> Qwen25VLConfig:
    """The captioner's config with what other files say of it."""
    return self._with_pixel_statistics(self._untied(captioner))

  def _untied(self, captioner: Qwen25VLConfig) -> Qwen25VLConfig:
    """The captioner with a head of its own if the files hold two different matrices, as transformers 5 reads them."""
    language = captioner.language
    if not language.ties_embeddings or ties_embeddings(self.language, EMBEDDING, HEAD, self.folders.language):
      return captioner
    return dataclasses.replace(captioner, language=dataclasses.replace(language, ties_embeddings=False))

  def _with_pixel_statistics(self, captioner: Qwen25VLConfig) -> Qwen25VLConfig:
    """The captioner with mean and standard deviation of the image processor."""
    file, settings = processor_files.image_settings(self.folders.language)
    statistics = {name: settings[name] for name in ("image_mean", "image_std") if settings.get(name)}
    for name, values in statistics.items():
      if not processor_files.is_statistic(values, is_divisor=name == "image_std"):
        raise ValueError(f"{file}: {name} is {values!r:.60}, expected three numbers")
    statistics = {name: tuple(map(float, values)) for name, values in statistics.items()}
    return dataclasses.replace(captioner, vision=dataclasses.replace(captioner.vision, **statistics))

  def _connector_config(self, captioner: Qwen25VLConfig, decoder: MMDiTConfig) -> ConnectorConfig:
    """The connector's config; the hidden width comes from the tensors, by default twice the context width as in UAE."""
    hidden = 2 * decoder.context_width
    if "projector.0.weight" in self.language:
      hidden = self.language.spec("projector.0.weight").shape[0]
    return ConnectorConfig(captioner.language.width, hidden, decoder.context_width)


def _stored_dtypes(parts: list[Part]) -> dict[str, np.dtype]:
  """Path of a leaf -> dtype of its tensors, without integer tensors, which the check of the parts reports."""
  stored: dict[str, np.dtype] = {}
  for part in parts:
    for row in part.table:
      name = row.theirs.replace("{layer}", str(row.first))
      if name not in part.tensors:
        continue
      kind = spec_of(part.tensors, name).dtype
      if jnp.issubdtype(kind, jnp.floating):
        stored |= {f"{part.name}/{path}".replace("{layer}", str(row.first)): kind for path in row.paths}
  return stored


def _fresh_connector(config: ConnectorConfig, abstract: dict) -> dict:
  """A randomly initialized connector, from a fixed key so that all loads agree."""

  def make():
    with nnx.use_eager_sharding(False):
      params = nnx.to_pure_dict(nnx.state(Connector(config, rngs=nnx.Rngs(0))))
    return jax.tree.map(lambda x, want: x.astype(want.dtype), params, abstract)

  return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()

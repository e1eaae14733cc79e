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

from collections.abc import Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from uae_jax import sharding
from uae_jax.data.processing import Processor
from uae_jax.layers import lora
from uae_jax.models.connector import Connector, ConnectorConfig
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.uae import UAE, UAEConfig
from uae_jax.models.vae import AutoencoderKLConfig
from uae_jax.plain import from_plain
from uae_jax.weights import connector, mmdit, pooled, qwen25_vl
from uae_jax.weights import vae as vae_weights
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE, typed
from uae_jax.weights.table import Row, WeightError, find_problems, stream
from uae_jax.weights.tensor_files import Renamed, Safetensors, open_file, open_folder, spec_of

EXTRAS = "uae.json"
# The connector of an export without base models; replaces the connector in llm_model.
CONNECTOR = "projector.safetensors"
DIFFUSERS_STEM, ADAPTER_STEM, ADAPTER_CONFIG = "diffusion_pytorch_model", "adapter_model", "adapter_config.json"
# A full state has no adapter_config.json; the published adapters have alpha = 2 * rank.
ALPHA_PER_RANK = 2.0


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
  parts = reader.parts()
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
  params: dict[str, Any] = {part.name: stream(part.tensors, part.table, abstract[part.name]) for part in parts}
  if missing_connector:
    warnings.warn(
      f"{path}: no projector.* in llm_model or llm_lora: the connector starts from random numbers, train it",
      stacklevel=5,
    )
    params["connector"] = _fresh_connector(reader.config.connector, abstract["connector"])
  params["pooled"] = jax.make_array_from_callback(
    condition.shape, abstract["pooled"].sharding, lambda index: condition[index]
  )
  return LoadedUAE(reader.config, graphdef, params, reader.processor, folders.language, reader.inference())


class Reader:
  """Reads the small files of a folder (configs, headers, processor), and collects their errors in `problems`."""

  def __init__(self, folders: Folders):
    self.folders = folders
    self.problems: list[str] = []
    self.extras = self._json(folders.root / EXTRAS, default={})
    self.language = Renamed()
    for folder, stem in ((folders.language, "model"), (folders.language_adapters, None)):
      if stem or folder.is_dir():
        stem = stem or (ADAPTER_STEM if (folder / ADAPTER_CONFIG).exists() else "model")
        self.language.add(self._open(folder, stem), qwen25_vl.canonical)
    if (folders.root / CONNECTOR).exists():
      tensors = self._attempt(lambda: open_file(folders.root / CONNECTOR))
      self.language.add(tensors or {}, qwen25_vl.canonical)
    self.decoder = self._open(folders.decoder, DIFFUSERS_STEM)
    self.decoder_adapters = Renamed()
    if folders.decoder_adapters.is_dir():
      self.decoder_adapters.add(
        self._open(folders.decoder_adapters, ADAPTER_STEM), lambda name: name.replace(".default.", ".")
      )
    self.vae = self._open(folders.diffusion / "vae", DIFFUSERS_STEM)

    captioner = self._config(Qwen25VLConfig, folders.language)
    decoder = self._config(MMDiTConfig, folders.decoder)
    vae = self._config(AutoencoderKLConfig, folders.diffusion / "vae")
    self.processor = self._attempt(lambda: Processor.from_folder(folders.language))
    self._uae: UAEConfig | None = None
    if captioner:
      pixels = self._json(folders.language / "preprocessor_config.json", default={})
      statistics = {name: tuple(pixels[name]) for name in ("image_mean", "image_std") if pixels.get(name)}
      captioner = dataclasses.replace(captioner, vision=dataclasses.replace(captioner.vision, **statistics))
    if captioner and decoder and vae:
      language_adapters = self._lora(
        folders.language_adapters, qwen25_vl.adapter_targets(captioner, self.language), self.language, "llm_lora"
      )
      decoder_adapters = None
      if len(self.decoder_adapters):
        targets = mmdit.adapter_targets(decoder, self.decoder_adapters)
        decoder_adapters = self._lora(folders.decoder_adapters, targets, self.decoder_adapters, "dit_lora")
      self._uae = UAEConfig(
        captioner=captioner,
        connector=self._connector_config(captioner, decoder),
        decoder=decoder,
        vae=vae,
        captioner_lora=language_adapters,
        decoder_lora=decoder_adapters,
        mask_context=self.extras.get("mask_context", False),
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
        statistics[name] = np.asarray(self.extras[name], np.float32)
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
    scheduler = self._json(folders.diffusion / "scheduler" / "scheduler_config.json", default={})
    generation = self._json(folders.language / "generation_config.json", default={})
    side = self.config.decoder.sample_size * self.config.vae.downsampling
    given = {field.name: extras[field.name] for field in dataclasses.fields(InferenceSettings) if field.name in extras}
    given.setdefault("resolution_px", side)
    given["shift"] = scheduler.get("shift", InferenceSettings.shift)
    given["repetition_penalty"] = generation.get("repetition_penalty") or InferenceSettings.repetition_penalty
    return from_plain(InferenceSettings, given, str(folders.root / EXTRAS))

  def _attempt(self, make):
    """Returns `make()`; if it fails, records the problem and returns None."""
    try:
      return make()
    except (OSError, ValueError, KeyError, TypeError) as error:
      text = f"missing {error}" if isinstance(error, KeyError) else str(error)
      self.problems.append(text)
      return None

  def _json(self, file: Path, default: dict | None = None) -> dict:
    if default is not None and not file.exists():
      return default
    return self._attempt(lambda: json.loads(file.read_text())) or {}

  def _open(self, folder: Path, stem: str) -> Safetensors:
    return self._attempt(lambda: open_folder(folder, stem)) or Safetensors([])

  def _config(self, cls, folder: Path):
    """Reads a config from `config.json`; if that fails, records the problem and returns None."""
    file = folder / "config.json"
    if not file.exists():
      self.problems.append(f"{file}: no such file")
      return None
    try:
      return cls.from_huggingface(json.loads(file.read_text()))
    except KeyError as error:
      self.problems.append(f"{file}: no field {error}")
    except (ValueError, TypeError) as error:
      self.problems.append(f"{file}: {error}")
    return None

  def _connector_config(self, captioner: Qwen25VLConfig, decoder: MMDiTConfig) -> ConnectorConfig:
    """The connector's config; the hidden width comes from the tensors, by default twice the context width as in UAE."""
    hidden = 2 * decoder.context_width
    if "projector.0.weight" in self.language:
      hidden = self.language.spec("projector.0.weight").shape[0]
    return ConnectorConfig(captioner.language.width, hidden, decoder.context_width)

  def _lora(self, folder: Path, targets: str | None, tensors: Mapping, name: str) -> lora.LoRA | None:
    """Adapter config, with the rank from shapes and alpha from `adapter_config.json`; None without adapters."""
    if targets is None:
      return None
    first = min((name for name in tensors if name.endswith(".lora_A.weight")), default=None)
    if first is None:
      self.problems.append(f"{folder}: no lora_A in it")
      return None
    rank = spec_of(tensors, first).shape[0]
    if not (folder / ADAPTER_CONFIG).exists():
      if name == "dit_lora":
        self.problems.append(f"{folder / ADAPTER_CONFIG}: no such file, so the adapters' scale is not known")
      return lora.LoRA(rank, ALPHA_PER_RANK * rank, targets)
    settings = self._json(folder / ADAPTER_CONFIG)
    for field in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
      if settings.get(field):
        self.problems.append(f"{folder / ADAPTER_CONFIG}: {field} is {settings[field]!r}, which is not supported")
    if settings.get("r") != rank:
      self.problems.append(f"{folder / ADAPTER_CONFIG}: r is {settings.get('r')}, the tensors have rank {rank}")
    alpha = float(settings.get("lora_alpha", rank))
    # Rank-stabilized adapters are scaled by alpha / sqrt(r).
    return lora.LoRA(rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha, targets)


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

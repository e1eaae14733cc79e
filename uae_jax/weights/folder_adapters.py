"""The adapters of a UAE folder: rank from the tensors, scale from what PEFT or diffusers wrote beside them."""

from collections.abc import Mapping
from pathlib import Path

from uae_jax import json_files
from uae_jax.layers import lora
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.weights import mmdit, peft_adapters
from uae_jax.weights.tensor_files import Renamed, Safetensors, spec_of

ADAPTER_STEM, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"
# A full state has no adapter_config.json; the published adapters have alpha = 2 * rank.
ALPHA_PER_RANK = 2.0
# Adapters written by diffusers: without another statement, their alpha is their rank.
DIFFUSERS_ADAPTERS, DIFFUSERS_METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


def read_captioner(
  folder: Path, targets: str, tensors: Mapping, file_names: list[str], problems: list[str]
) -> lora.LoRA:
  """The captioner's adapters, with rank from shapes and alpha from `adapter_config.json`.

  Args:
    folder: folder of the adapters.
    targets: pattern of the adapted matrices.
    tensors: the captioner's tensors.
    file_names: names of the tensors in the adapters' file.
    problems: receives what of the config is not supported.
  """
  rank = _rank(tensors)
  file = folder / ADAPTER_CONFIG
  if not file.exists():
    return lora.LoRA(rank, ALPHA_PER_RANK * rank, targets)
  try:
    settings = json_files.read_object(file)
  except (OSError, ValueError) as error:
    problems.append(str(error))
    settings = {}
  return _scaled(file, settings, file_names, rank, targets, problems)


def read_decoder(folder: Path, decoder: MMDiTConfig, problems: list[str]) -> tuple[lora.LoRA, Renamed]:
  """The decoder's adapters, and their tensors under PEFT's names.

  Args:
    folder: folder of the adapters.
    decoder: config of the decoder.
    problems: receives what of their config is not supported.

  Raises:
    ValueError: the folder has no adapters, several sets of them, or no scale.
  """
  file, config = _adapter_file(folder), folder / ADAPTER_CONFIG
  tensors = Safetensors([file])
  modules = ["pos_embed.proj", *mmdit.modules(decoder)]
  adapters, alphas = peft_adapters.decoder_tensors(tensors, modules, decoder.depth)
  if not any(name.endswith(".lora_A.weight") for name in adapters):
    raise ValueError(f"{file}: no adapters in it")
  names, rank = list(adapters), _rank(adapters)
  targets = mmdit.adapter_targets(decoder, adapters)
  adapted = {module for name in names if (module := peft_adapters.adapted_module(name))}
  try:
    alpha = peft_adapters.common_alpha(alphas, adapted)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  if config.exists():
    found = _scaled(config, json_files.read_object(config), names, rank, targets, problems)
    if alpha not in (None, found.alpha):
      problems.append(f"{file}: its alpha is {alpha}, that of {ADAPTER_CONFIG} is {found.alpha}")
    return found, adapters
  if DIFFUSERS_METADATA in tensors.metadata:
    settings = json_files.parse_object(tensors.metadata[DIFFUSERS_METADATA].encode(), f"{file}: {DIFFUSERS_METADATA}")
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    return _scaled(file, settings, names, rank, targets, problems), adapters
  if alpha is None and file.name != DIFFUSERS_ADAPTERS:
    raise ValueError(f"{config}: no such file, so the adapters' scale is not known")
  return lora.LoRA(rank, float(rank if alpha is None else alpha), targets), adapters


def _scaled(file: Path, settings: Mapping, names: list[str], rank: int, targets: str, problems: list[str]) -> lora.LoRA:
  """Adapters with the scale of a PEFT config."""
  found = peft_adapters.read_config(settings, names)
  problems += [f"{file}: {problem}" for problem in found.problems]
  if found.rank != rank:
    problems.append(f"{file}: r is {found.rank}, the tensors have rank {rank}")
  return lora.LoRA(rank, found.alpha, targets)


def _adapter_file(folder: Path) -> Path:
  """The adapter file of PEFT or diffusers in a folder, or its only safetensors file.

  Raises:
    ValueError: there is none, or there are several.
  """
  for name in (f"{ADAPTER_STEM}.safetensors", DIFFUSERS_ADAPTERS):
    if (folder / name).exists():
      return folder / name
  files = sorted(folder.glob("*.safetensors"))
  if len(files) != 1:
    raise ValueError(f"{folder}: no {ADAPTER_STEM}.safetensors, and {len(files)} other safetensors files")
  return files[0]


def _rank(tensors: Mapping) -> int:
  """The rank of the first adapter by name; a check of all shapes follows."""
  first = min(name for name in tensors if name.endswith(".lora_A.weight"))
  shape = spec_of(tensors, first).shape
  if not shape or not shape[0]:
    raise ValueError(f"{first}: shape {shape} is that of no adapter")
  return shape[0]

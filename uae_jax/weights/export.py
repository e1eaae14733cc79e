"""Export of a UAE to PyTorch folders: models with merged adapters, or PEFT adapters next to their base model.

The layout is the one that `weights.official` reads, so an export can be loaded again. Tensors are written one at a
time.
"""

from collections.abc import Iterator, Mapping
import json
from pathlib import Path
import re
import shutil
from typing import Any

import numpy as np

from uae_jax import json_files, trees
from uae_jax.data import processor_files
from uae_jax.layers import lora
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.uae import UAEConfig
from uae_jax.plain import to_plain
from uae_jax.weights import connector, huggingface_configs, mmdit, pooled, qwen25_vl
from uae_jax.weights import vae as vae_weights
from uae_jax.weights.checkpoint import LoadedUAE
from uae_jax.weights.folder_adapters import ADAPTER_CONFIG, ADAPTER_STEM
from uae_jax.weights.official import CONNECTOR, DIFFUSERS_STEM, EXTRAS, Folders
from uae_jax.weights.table import Row, expand, match_spec
from uae_jax.weights.tensor_files import Renamed, Spec, write, write_folder

# Suffixes of the processor's files in a model folder.
PROCESSOR_SUFFIXES = (".json", ".txt", ".jinja")
NOT_PROCESSOR = ("config.json", ADAPTER_CONFIG)


class Dump(Mapping):
  """A lazy mapping of tensor names to exported arrays; a tensor is fetched, merged and converted on access.

  Args:
    params: nested dict of arrays; leaves without a row, such as merged adapters, are not exported themselves.
    table: rows for the leaves to export.
    merge_scale: alpha / r of adapters to merge into their kernels; None does not merge.
  """

  def __init__(self, params: Mapping, table: tuple[Row, ...], merge_scale: float | None = None):
    self._leaves = dict(trees.items(params))
    self._merge_scale = merge_scale
    ours = {path for row in table for path in row.paths}
    chosen = trees.from_items((path, leaf) for path, leaf in self._leaves.items() if path in ours)
    self._places = {name: (match, i) for match in expand(table, chosen) for i, name in enumerate(match.names)}

  def __getitem__(self, name: str) -> np.ndarray:
    match, index = self._places[name]
    layer = index if match.is_stacked else None
    return match.join([self._merged(path, layer) for path in match.paths])

  def _merged(self, path: str, layer: int | None) -> np.ndarray:
    """One layer of a stacked leaf, or an unstacked leaf, with its adapter merged if `merge_scale` is set."""
    value = self._fetch(path, layer)
    a, b = (path.removesuffix("kernel") + leaf for leaf in lora.ADAPTER_NAMES)
    if self._merge_scale is not None and path.endswith("kernel") and a in self._leaves:
      product = self._fetch(a, layer).astype(np.float32) @ self._fetch(b, layer).astype(np.float32)
      value = (value.astype(np.float32) + self._merge_scale * product).astype(value.dtype)
    return value

  def _fetch(self, path: str, layer: int | None) -> np.ndarray:
    leaf = self._leaves[path]
    return np.asarray(leaf if layer is None else leaf[layer])

  def __contains__(self, name: object) -> bool:
    return name in self._places

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)

  def spec(self, name: str) -> Spec:
    match, _ = self._places[name]
    return match_spec(match, self._leaves)


def write_uae(
  target: Path,
  loaded: LoadedUAE,
  *,
  merged: bool,
  adapters_only: bool = False,
  names: str = "v5",
) -> None:
  """Writes all folders of a UAE.

  Args:
    target: an empty folder.
    loaded: the UAE; embedders in its parameters are not exported.
    merged: merge the adapters into the weights; otherwise write them as PEFT adapters.
    adapters_only: write only the adapters and the connector.
    names: module names in the language model's adapter: "v5" (transformers 4.52 and later) or "official" (4.50).

  Raises:
    ValueError: `merged` is False and there are no adapters, or the captioner is not a Qwen2.5-VL.
  """
  folders, config, params = Folders(target), loaded.config, loaded.params
  if not isinstance(config, UAEConfig) or not isinstance(config.captioner, Qwen25VLConfig):
    raise ValueError(
      f"the captioner is a {type(config.captioner).__name__}, and only a Qwen2.5-VL has such a folder: use --to orbax"
    )
  if not merged:
    if not (config.captioner_lora or config.decoder_lora):
      raise ValueError("these weights have no adapters: use --to huggingface")
    _write_language_adapters(
      folders.language_adapters, config.captioner, config.captioner_lora, params["captioner"], names
    )
    _write_decoder_adapters(folders.decoder_adapters, config, params["decoder"])
  connector_tensors = Dump(params["connector"], connector.table(config.connector))
  if adapters_only:
    write(target / CONNECTOR, connector_tensors)
    return

  captioner = Dump(params["captioner"], qwen25_vl.table(config.captioner), _scale(config.captioner_lora, merged))
  language = Renamed()
  for tensors in (captioner, connector_tensors):
    language.add(tensors, str)
  copy_processor(loaded.processor_folder, folders.language)
  dtype = np.dtype(params["captioner"]["language"]["embedding"].dtype).name
  _write_json(folders.language / "config.json", _language_config(loaded, config.captioner, dtype))
  _write_pixel_statistics(folders.language, config.captioner)
  write_folder(folders.language, "model", language)

  decoder = Dump(params["decoder"], mmdit.table(config.decoder), _scale(config.decoder_lora, merged))
  write_folder(folders.root / "dit", DIFFUSERS_STEM, decoder)
  _write_json(folders.root / "dit" / "config.json", huggingface_configs.mmdit(config.decoder))

  vae = folders.diffusion / "vae"
  rows = tuple(row for row in vae_weights.table(config.vae) if not row.paths[0].startswith("latent_"))
  write_folder(vae, DIFFUSERS_STEM, Dump(params["vae"], rows))
  scaling, shift = (np.asarray(params["vae"][name]) for name in ("latent_scaling", "latent_shift"))
  # The shortest decimal that rounds to the float32: 1.5305, not 1.5305000543594360.
  numbers = [float(str(values.mean(dtype=np.float32))) for values in (scaling, shift)]
  _write_json(vae / "config.json", huggingface_configs.autoencoder_kl(config.vae, *numbers))
  scheduler = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": loaded.inference.shift,
  }
  _write_json(folders.diffusion / "scheduler" / "scheduler_config.json", scheduler)
  write(folders.diffusion / pooled.FILE, {pooled.NAME: np.asarray(params["pooled"])})
  extras = to_plain(loaded.inference) | {"mask_context": config.mask_context}
  # Other files of the official layout contain these two.
  del extras["shift"], extras["repetition_penalty"]
  if merged:
    # With merged adapters there is no reference policy left to embed captions.
    extras["text_tower"] = "policy"
  if np.ptp(scaling) or np.ptp(shift):
    # diffusers has one value for all channels; ours may have one per channel, measured by a run.
    extras |= {"scaling_factor": scaling.tolist(), "shift_factor": shift.tolist()}
  _write_json(target / EXTRAS, extras)


def copy_processor(source: Path, target: Path) -> None:
  """Copies the files of a tokenizer and image processor, and `generation_config.json`."""
  target.mkdir(parents=True, exist_ok=True)
  for file in sorted(source.iterdir()):
    is_weights = file.name.endswith(".index.json") or file.name in NOT_PROCESSOR
    if file.is_file() and file.suffix in PROCESSOR_SUFFIXES and not is_weights:
      shutil.copyfile(file, target / file.name)


def _scale(adapters: lora.LoRA | None, merged: bool) -> float | None:
  return adapters.alpha / adapters.rank if adapters and merged else None


def _language_config(loaded: LoadedUAE, captioner: Qwen25VLConfig, dtype: str) -> dict[str, Any]:
  """The content of `config.json`: that of the source if it exists, because it has more fields, else our own."""
  file = loaded.processor_folder / "config.json"
  if file.exists():
    return json_files.read_object(file)
  tokens = loaded.processor
  return huggingface_configs.qwen25_vl(captioner, dtype) | {
    "eos_token_id": tokens.end_ids[0],
    "pad_token_id": tokens.pad_id,
    "bos_token_id": tokens.pad_id,
  }


def _write_pixel_statistics(folder: Path, config: Qwen25VLConfig) -> None:
  """Corrects mean and std in a processor's file to those that the model uses; the small world's file differs."""
  vision = config.vision
  wanted = {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
  if (changed := processor_files.replace_image_settings(folder, wanted)) is not None:
    _write_json(*changed)


def _write_language_adapters(
  folder: Path, captioner: Qwen25VLConfig, adapters: lora.LoRA | None, params: Mapping, names: str
) -> None:
  if adapters is None:
    return
  table = qwen25_vl.adapter_table(captioner, adapters, names, prefix=mmdit.PEFT)
  targets = [
    _pattern(theirs, range(depth))
    for theirs, ours, depth in qwen25_vl.linears(captioner, names)
    if re.search(adapters.targets, ours)
  ]
  _write_adapters(folder, adapters, Dump(params, table), targets)


def _write_decoder_adapters(folder: Path, config: UAEConfig, params: Mapping) -> None:
  if config.decoder_lora is None:
    return
  adapters = config.decoder_lora
  targets = [
    _pattern(theirs, range(first, first + count))
    for theirs, ours, first, count in (("pos_embed.proj", "patch_embed", 0, 1), *mmdit.linears(config.decoder))
    if re.search(adapters.targets, ours)
  ]
  _write_adapters(folder, adapters, Dump(params, mmdit.adapter_table(config.decoder, adapters)), targets)


def _pattern(theirs: str, layers: range) -> str:
  numbers = f"({'|'.join(map(str, layers))})"
  return re.escape(theirs).replace(re.escape("{layer}"), numbers)


def _write_adapters(folder: Path, adapters: lora.LoRA, tensors: Dump, targets: list[str]) -> None:
  folder.mkdir(parents=True)
  write(folder / f"{ADAPTER_STEM}.safetensors", tensors)
  _write_json(folder / ADAPTER_CONFIG, huggingface_configs.adapter(adapters, f"({'|'.join(targets)})"))


def _write_json(file: Path, content: Mapping) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content, indent=2) + "\n")

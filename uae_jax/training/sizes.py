"""The models a config can name, and the sizes of a run's nets, which the workdir keeps as JSON."""

from collections.abc import Callable, Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

from uae_jax.data.processing import Processor
from uae_jax.embedders import registry
from uae_jax.embedders.kind import EmbedderSizes, published
from uae_jax.layers.lora import LoRA
from uae_jax.layers.stack import REMAT_POLICIES
from uae_jax.models.clip import CLIPTextConfig
from uae_jax.models.uae import UAEConfig
from uae_jax.options import FRESH
from uae_jax.plain import from_plain, to_plain
from uae_jax.small_world import sizes as small_world
from uae_jax.small_world.processor import write_processor
from uae_jax.weights import legacy

FILE = "model.json"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """
  Attributes:
    uae: of the five nets.
    embedders: kind -> sizes.
  """

  uae: UAEConfig
  embedders: dict[str, EmbedderSizes]


@dataclasses.dataclass(frozen=True)
class NamedModel:
  """What a run needs to know of a model that `config.model` names.

  Attributes:
    uae: (processor, adapters of one rank and scale) -> sizes; None where the weights alone have them.
    trains_from_scratch: whether the run trains every net itself, so that embedders may start from random numbers.
    write_processor: writes tokenizer and image processor to a folder; None where the user brings them.
    embedders: kind -> config of the network of an embedder without weights; None for the published sizes.
    embedder_px: side of the images that those embedders see.
    text_tower: (vocabulary size, tokens per caption, id of the end token) -> config of the text tower that trains
      embedders; None where they come trained.
  """

  uae: Callable[[Processor, LoRA], UAEConfig] | None
  trains_from_scratch: bool = False
  write_processor: Callable[[Path], None] | None = None
  embedders: Callable[[], Mapping[str, Any]] | None = None
  embedder_px: int = 0
  text_tower: Callable[[int, int, int], CLIPTextConfig] | None = None


# The name of any model: its sizes are those of `config.init.weights`.
FROM_WEIGHTS = "weights"
MODELS = {
  small_world.SMALL_WORLD: NamedModel(
    uae=lambda processor, lora: small_world.uae(
      processor.vocab_size, processor.image_token_id, rank=lora.rank, alpha=lora.alpha
    ),
    trains_from_scratch=True,
    write_processor=write_processor,
    embedders=small_world.embedders,
    embedder_px=small_world.IMAGE_PX,
    text_tower=small_world.clip_text,
  ),
  "uae_3b_sd35_large": NamedModel(lambda processor, lora: UAEConfig.uae_3b_sd35_large(lora.rank, lora.alpha)),
  "uae_3b_sd35_medium": NamedModel(lambda processor, lora: UAEConfig.uae_3b_sd35_medium(lora.rank, lora.alpha)),
  FROM_WEIGHTS: NamedModel(uae=None),
}


def find(name: str) -> NamedModel:
  """The row of `config.model`.

  Raises:
    ValueError: unknown name.
  """
  if name not in MODELS:
    raise ValueError(f"config.model = {name!r}: expected one of {', '.join(MODELS)}")
  return MODELS[name]


def named_uae(name: str, processor: Processor, lora: LoRA) -> UAEConfig:
  """The UAE of `config.model` with adapters of one rank and scale.

  Raises:
    ValueError: unknown name, or one whose sizes only the weights have.
  """
  model = find(name)
  if model.uae is None:
    raise ValueError(f"config.model = {name!r} takes its sizes from config.init.weights, which is empty")
  return model.uae(processor, lora)


def with_adapters(config: UAEConfig, lora: LoRA) -> UAEConfig:
  """The same UAE with adapters where it has none; those it has stay as they are."""
  fresh = UAEConfig.uae_3b_sd35_large(lora.rank, lora.alpha)
  return dataclasses.replace(
    config,
    captioner_lora=config.captioner_lora or fresh.captioner_lora,
    decoder_lora=config.decoder_lora or fresh.decoder_lora,
  )


def rematerialized(config: UAEConfig, policy: str) -> UAEConfig:
  """The same UAE whose backward pass keeps of each layer what `policy` of `layers.stack.REMAT_POLICIES` says.

  Raises:
    ValueError: unknown policy.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(f"config.remat = {policy!r}: expected one of {', '.join(REMAT_POLICIES)}")
  return dataclasses.replace(
    config,
    captioner=config.captioner.with_remat(policy),
    decoder=dataclasses.replace(config.decoder, remat=policy),
    vae=dataclasses.replace(config.vae, remat=policy),
  )


def fresh_embedder(kind: str, model: str) -> EmbedderSizes:
  """Sizes of an embedder with random weights: the model's own, or published ones.

  Raises:
    ValueError: the kind is unknown, or the model has none of this kind.
  """
  sizes, row = published(kind), find(model)
  if row.embedders is None:
    return sizes
  networks = row.embedders()
  if kind not in networks:
    raise ValueError(
      f"config.embedders.{kind} = {FRESH!r}: config.model = {model!r} has sizes of {' and '.join(networks)} only"
    )
  return dataclasses.replace(sizes, network=networks[kind], image_px=row.embedder_px)


def write(workdir: Path, sizes: Sizes) -> None:
  """Keeps the sizes beside the config, whole or not at all."""
  file = Path(workdir) / FILE
  temporary = file.with_suffix(".tmp")
  temporary.write_text(json.dumps(to_plain(sizes), indent=2) + "\n")
  temporary.replace(file)


def read(workdir: Path) -> Sizes:
  """The sizes of a run.

  Raises:
    ValueError: the file is missing or damaged.
  """
  file = Path(workdir) / FILE
  try:
    plain = legacy.current_fields(json.loads(file.read_text()))
    embedders = {kind: _embedder(fields, f"embedders.{kind}") for kind, fields in plain["embedders"].items()}
    return Sizes(from_plain(UAEConfig, plain["uae"], "uae"), embedders)
  except FileNotFoundError as error:
    raise ValueError(f"{file}: no such file; it is written when a run starts") from error
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} is damaged: {error}") from error


def _embedder(fields: dict, where: str) -> EmbedderSizes:
  """The config of the network is of the type that its kind says."""
  network = from_plain(registry.find(fields["kind"]).config, fields["network"], f"{where}.network")
  return from_plain(EmbedderSizes, fields | {"network": network}, where)

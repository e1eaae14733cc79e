"""The models that `config.model` can name, and the sizes of a run's networks, stored as JSON in the workdir."""

from collections.abc import Callable, Mapping
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from uae_jax import json_files
from uae_jax.data.processing import Processor
from uae_jax.embedders import registry
from uae_jax.embedders.kind import EmbedderSizes, published
from uae_jax.files import write_whole
from uae_jax.layers.lora import LoRA
from uae_jax.layers.stack import REMAT_POLICIES
from uae_jax.models.clip import CLIPTextConfig
from uae_jax.models.janus.system import JanusSystemConfig
from uae_jax.models.system import SystemConfig
from uae_jax.models.systems import KINDS
from uae_jax.models.uae import UAEConfig
from uae_jax.options import FRESH
from uae_jax.plain import from_plain, to_plain
from uae_jax.small_world import sizes as small_world
from uae_jax.small_world.processor import RICH, write_processor
from uae_jax.weights import legacy

FILE = "model.json"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of all networks of a run.

  Attributes:
    uae: config of the networks of the UAE.
    embedders: kind of embedder -> sizes.
  """

  uae: Annotated[SystemConfig, KINDS]
  embedders: dict[str, EmbedderSizes]


@dataclasses.dataclass(frozen=True)
class NamedModel:
  """Definition of a model that `config.model` can name.

  Attributes:
    uae: (processor, rank and alpha of adapters) -> config of the UAE; None if only the weights define it.
    trains_from_scratch: whether runs train all networks themselves, so that embedders may be initialized at random.
    write_processor: writes tokenizer and image processor to a folder; None if the user must provide them.
    embedders: () -> {kind: config of the network} for embedders without weights; None for the published sizes.
    embedder_px: side of the input images of these embedders, in pixels.
    text_tower: (vocabulary size, tokens per caption, id of the end token) -> config of the text tower that embedders
      are trained with; None for pre-trained embedders.
  """

  uae: Callable[[Processor, LoRA], SystemConfig] | None
  trains_from_scratch: bool = False
  write_processor: Callable[[Path], None] | None = None
  embedders: Callable[[], Mapping[str, Any]] | None = None
  embedder_px: int = 0
  text_tower: Callable[[int, int, int], CLIPTextConfig] | None = None


# Stands for any model; its sizes are those of `config.init.weights`.
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
  small_world.RICH: NamedModel(
    uae=lambda processor, lora: small_world.rich_uae(
      processor.vocab_size, processor.image_token_id, rank=lora.rank, alpha=lora.alpha
    ),
    trains_from_scratch=True,
    write_processor=lambda folder: write_processor(folder, RICH),
    embedders=lambda: small_world.embedders(small_world.RICH_PX),
    embedder_px=small_world.RICH_PX,
    text_tower=small_world.clip_text,
  ),
  "uae_3b_sd35_large": NamedModel(lambda processor, lora: UAEConfig.uae_3b_sd35_large(lora.rank, lora.alpha)),
  "uae_3b_sd35_medium": NamedModel(lambda processor, lora: UAEConfig.uae_3b_sd35_medium(lora.rank, lora.alpha)),
  "janus_pro_1b": NamedModel(lambda processor, lora: JanusSystemConfig.janus_pro_1b(lora.rank, lora.alpha)),
  "janus_pro_7b": NamedModel(lambda processor, lora: JanusSystemConfig.janus_pro_7b(lora.rank, lora.alpha)),
  FROM_WEIGHTS: NamedModel(uae=None),
}


def find(name: str) -> NamedModel:
  """Returns the definition of the model `name`.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in MODELS:
    raise ValueError(f"config.model = {name!r}: expected one of {', '.join(MODELS)}")
  return MODELS[name]


def named_uae(name: str, processor: Processor, lora: LoRA) -> SystemConfig:
  """Returns the config of the system of the model `name`, with adapters of the rank and alpha of `lora`.

  Raises:
    ValueError: the name is unknown, or only the weights define the sizes of the model.
  """
  model = find(name)
  if model.uae is None:
    raise ValueError(f"config.model = {name!r} takes its sizes from config.init.weights, which is empty")
  return model.uae(processor, lora)


def rematerialized(config: SystemConfig, policy: str) -> SystemConfig:
  """Sets the rematerialization policy of a system, one of `layers.stack.REMAT_POLICIES`.

  Raises:
    ValueError: the policy is unknown.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(f"config.remat = {policy!r}: expected one of {', '.join(REMAT_POLICIES)}")
  return config.with_remat(policy)


def fresh_embedder(kind: str, model: str) -> EmbedderSizes:
  """Returns the sizes of an embedder with random weights: those that the model defines, or the published ones.

  Raises:
    ValueError: the kind is unknown, or the model defines embedders, but none of this kind.
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
  """Atomically writes the sizes to the workdir."""
  write_whole(Path(workdir) / FILE, json.dumps(to_plain(sizes), indent=2) + "\n")


def read(workdir: Path) -> Sizes:
  """Reads the sizes of a run.

  Raises:
    ValueError: the file is missing or damaged.
  """
  file = Path(workdir) / FILE
  try:
    plain = legacy.current_fields(json_files.read_object(file))
    embedders = {kind: _embedder(fields, f"embedders.{kind}") for kind, fields in plain["embedders"].items()}
    return Sizes(KINDS.from_plain(plain["uae"], "uae"), embedders)
  except FileNotFoundError as error:
    raise ValueError(f"{file}: no such file; it is written when a run starts") from error
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} is damaged: {error}") from error


def _embedder(fields: dict, where: str) -> EmbedderSizes:
  """Reads the sizes of one embedder; its kind determines the type of the network's config."""
  network = from_plain(registry.find(fields["kind"]).config, fields["network"], f"{where}.network")
  return from_plain(EmbedderSizes, fields | {"network": network}, where)

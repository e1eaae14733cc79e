"""The sizes of a run's nets: of a name in the config, or of the weights it starts from; kept in the workdir as JSON."""

import dataclasses
import json
from pathlib import Path

from uae_jax.data.processing import Processor
from uae_jax.embedders import registry
from uae_jax.embedders.kind import EmbedderSizes, published
from uae_jax.layers.lora import LoRA
from uae_jax.layers.stack import REMAT_POLICIES
from uae_jax.models.uae import UAEConfig
from uae_jax.small_world import sizes as small_world
from uae_jax.small_world.sizes import SMALL_WORLD
from uae_jax.weights.native import from_plain

FULL_SIZE = {"uae_3b_sd35_large": UAEConfig.uae_3b_sd35_large, "uae_3b_sd35_medium": UAEConfig.uae_3b_sd35_medium}
FROM_WEIGHTS = "weights"
MODELS = (SMALL_WORLD, *FULL_SIZE, FROM_WEIGHTS)
FRESH = "fresh"
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


def named_uae(name: str, processor: Processor, lora: LoRA) -> UAEConfig:
  """The UAE of `config.model` with adapters of one rank and scale.

  Raises:
    ValueError: unknown name, or one whose sizes only the weights know.
  """
  if name == SMALL_WORLD:
    return small_world.uae(processor.vocab_size, processor.image_token_id, rank=lora.rank, alpha=lora.alpha)
  if name in FULL_SIZE:
    return FULL_SIZE[name](lora.rank, lora.alpha)
  if name == FROM_WEIGHTS:
    raise ValueError(f"config.model = {name!r} takes its sizes from config.init.weights, which is empty")
  raise ValueError(f"config.model = {name!r}: expected one of {', '.join(MODELS)}")


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
  captioner = dataclasses.replace(
    config.captioner,
    vision=dataclasses.replace(config.captioner.vision, remat=policy),
    language=dataclasses.replace(config.captioner.language, remat=policy),
  )
  return dataclasses.replace(
    config,
    captioner=captioner,
    decoder=dataclasses.replace(config.decoder, remat=policy),
    vae=dataclasses.replace(config.vae, remat=policy),
  )


def fresh_embedder(kind: str, model: str) -> EmbedderSizes:
  """Sizes of an embedder with random weights: the small world's own, or published ones.

  Raises:
    ValueError: the kind is unknown, or the small world has none of this kind.
  """
  sizes = published(kind)
  if model != SMALL_WORLD:
    return sizes
  networks = small_world.embedders()
  if kind not in networks:
    raise ValueError(f"config.embedders.{kind} = {FRESH!r}: the small world has sizes of {' and '.join(networks)} only")
  return dataclasses.replace(sizes, network=networks[kind], image_px=small_world.IMAGE_PX)


def write(workdir: Path, sizes: Sizes) -> None:
  """Keeps the sizes beside the config, whole or not at all."""
  file = Path(workdir) / FILE
  temporary = file.with_suffix(".tmp")
  temporary.write_text(json.dumps(dataclasses.asdict(sizes), indent=2) + "\n")
  temporary.replace(file)


def read(workdir: Path) -> Sizes:
  """The sizes of a run.

  Raises:
    ValueError: the file is missing or damaged.
  """
  file = Path(workdir) / FILE
  try:
    plain = json.loads(file.read_text())
    embedders = {}
    for name, fields in plain["embedders"].items():
      network = from_plain(registry.find(fields["kind"]).config, fields.pop("network"))
      embedders[name] = EmbedderSizes(network=network, **{key: _tuple(value) for key, value in fields.items()})
    return Sizes(from_plain(UAEConfig, plain["uae"]), embedders)
  except FileNotFoundError as error:
    raise ValueError(f"{file}: no such file; it is written when a run starts") from error
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} is damaged: {error}") from error


def _tuple(value):
  return tuple(value) if isinstance(value, list) else value

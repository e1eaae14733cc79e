"""The sizes of a run's nets: of a name in the config, or of the weights it starts from; kept in the workdir as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx

from uae_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from uae_jax.data.processing import Processor
from uae_jax.layers.lora import LoRA
from uae_jax.layers.stack import REMAT_POLICIES
from uae_jax.models.clip import CLIPVision, CLIPVisionConfig
from uae_jax.models.dinov2 import DINOv2, DINOv2Config
from uae_jax.models.dinov3 import DINOv3, DINOv3Config
from uae_jax.models.uae import UAEConfig
from uae_jax.small_world import sizes as small_world
from uae_jax.small_world.sizes import SMALL_WORLD
from uae_jax.weights.native import from_plain

FULL_SIZE = {"uae_3b_sd35_large": UAEConfig.uae_3b_sd35_large, "uae_3b_sd35_medium": UAEConfig.uae_3b_sd35_medium}
FROM_WEIGHTS = "weights"
MODELS = (SMALL_WORLD, *FULL_SIZE, FROM_WEIGHTS)
NETWORKS = {
  "clip": (CLIPVision, CLIPVisionConfig),
  "longclip": (CLIPVision, CLIPVisionConfig),
  "dinov2": (DINOv2, DINOv2Config),
  "dinov3": (DINOv3, DINOv3Config),
}
FRESH = "fresh"
FILE = "model.json"


@dataclasses.dataclass(frozen=True)
class EmbedderSizes:
  """An image encoder: architecture and what its pixels are.

  Attributes:
    kind: a key of `NETWORKS`.
    network: its config.
    image_px: side of the square it sees.
    mean: of the channels in 0..1.
    std: of the channels in 0..1.
  """

  kind: str
  network: Any
  image_px: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    return NETWORKS[self.kind][0](self.network, rngs=rngs)


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
  """An encoder without weights: the small world's own, or the published size.

  Raises:
    ValueError: there is none of this kind.
  """
  pixels = {"clip": (OPENAI_MEAN, OPENAI_STD), "dinov2": (IMAGENET_MEAN, IMAGENET_STD)}
  if kind not in pixels:
    raise ValueError(f"config.embedders.{kind} = {FRESH!r}: only {' and '.join(pixels)} have a size without weights")
  if model == SMALL_WORLD:
    network = small_world.clip_vision() if kind == "clip" else small_world.dinov2()
    return EmbedderSizes(kind, network, small_world.IMAGE_PX, *pixels[kind])
  # DINOv2's table of positions is stored for 518 px; as an embedder it sees 224.
  network = CLIPVisionConfig.clip_vit_l14() if kind == "clip" else DINOv2Config.dinov2_large()
  return EmbedderSizes(kind, network, 224, *pixels[kind])


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
      network = from_plain(NETWORKS[fields["kind"]][1], fields.pop("network"))
      embedders[name] = EmbedderSizes(network=network, **{key: _tuple(value) for key, value in fields.items()})
    return Sizes(from_plain(UAEConfig, plain["uae"]), embedders)
  except FileNotFoundError as error:
    raise ValueError(f"{file}: no such file; it is written when a run starts") from error
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} is damaged: {error}") from error


def _tuple(value):
  return tuple(value) if isinstance(value, list) else value

"""From a config to nets: graph definitions, prompts, and a function that makes fresh parameters."""

from collections.abc import Callable
import dataclasses
from pathlib import Path

from flax import nnx
import jax
from jax.sharding import Mesh

from uae_jax import sharding, trees
from uae_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from uae_jax.data.processing import Processor
from uae_jax.data.vocabulary import write_processor
from uae_jax.embedders import ImageEncoder
from uae_jax.layers.buffer import Buffer
from uae_jax.models import scenes
from uae_jax.models.clip import CLIPText, CLIPVision, CLIPVisionConfig
from uae_jax.models.dinov2 import DINOv2, DINOv2Config
from uae_jax.models.prompts import Prompts
from uae_jax.models.uae import UAE, UAEConfig
from uae_jax.networks import Networks

SMALL_WORLD = "scenes"
MODELS = (SMALL_WORLD, "uae_3b_sd35_large", "uae_3b_sd35_medium")


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
  """All static parts of a run.

  Attributes:
    networks: graph definitions, prompts, encoders.
    processor: tokenizer and image processor.
    abstract_params: nested dict of `ShapeDtypeStruct`s with shardings.
    buffers: paths of stored constants, which no stage trains.
    init: key -> fresh parameters of that structure.
    make_text_tower: key -> a text tower for contrastive training; small world only.
  """

  networks: Networks
  processor: Processor
  abstract_params: dict
  buffers: frozenset[str]
  init: Callable[[jax.Array], dict]
  make_text_tower: Callable[[nnx.Rngs], CLIPText] | None

  @property
  def shardings(self) -> dict:
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)


def build_processor(config, folder: Path) -> Processor:
  """The processor of `config.processor`, or the small world's own, written to `folder` at first use."""
  if config.processor:
    return Processor.from_folder(config.processor)
  if config.model != SMALL_WORLD:
    raise ValueError(f"config.processor is empty: {config.model} needs the folder of its tokenizer and image processor")
  if not (folder / "tokenizer.json").exists():
    write_processor(folder)
  return Processor.from_folder(folder)


def model_configs(name: str, processor: Processor) -> tuple[UAEConfig, dict]:
  """(sizes of the UAE, encoder name -> its config) of `config.model`.

  Raises:
    ValueError: unknown model.
  """
  if name == SMALL_WORLD:
    vocabulary = processor.vocab_size
    encoders = {"clip": scenes.clip_vision(), "dinov2": scenes.dinov2()}
    return scenes.uae(vocabulary, processor.image_token_id), encoders
  encoders = {"clip": CLIPVisionConfig.clip_vit_l14(), "dinov2": DINOv2Config.dinov2_large()}
  if name == "uae_3b_sd35_large":
    return UAEConfig.uae_3b_sd35_large(), encoders
  if name == "uae_3b_sd35_medium":
    return UAEConfig.uae_3b_sd35_medium(), encoders
  raise ValueError(f"config.model = {name!r}: expected one of {', '.join(MODELS)}")


ENCODERS = {"clip": CLIPVision, "dinov2": DINOv2}
# Side, mean and deviation of what each encoder sees; DINOv2 is stored at 518 px and used at 224.
ENCODER_PIXELS = {
  is_small: {"clip": (side, OPENAI_MEAN, OPENAI_STD), "dinov2": (side, IMAGENET_MEAN, IMAGENET_STD)}
  for is_small, side in ((True, scenes.IMAGE_PX), (False, 224))
}


def build(config, processor: Processor, mesh: Mesh) -> Built:
  """Nets of `config.model` for square images of `config.data.image_px`."""
  uae_config, encoder_configs = model_configs(config.model, processor)
  patch = uae_config.captioner.vision.patch_size
  prompts = Prompts.from_processor(processor, (config.data.image_px // patch,) * 2)

  builders = {name: lambda rngs, c=c, n=name: ENCODERS[n](c, rngs=rngs) for name, c in encoder_configs.items()}
  graphdef, abstract_uae = sharding.abstract_model(lambda: UAE(uae_config, rngs=nnx.Rngs(0)), mesh)
  encoders, abstract_encoders = {}, {}
  for name, builder in builders.items():
    encoder_graphdef, abstract_encoders[name] = sharding.abstract_model(lambda b=builder: b(nnx.Rngs(0)), mesh)
    encoders[name] = ImageEncoder(name, encoder_graphdef, *ENCODER_PIXELS[config.model == SMALL_WORLD][name])

  def init(key: jax.Array) -> dict:
    def fresh(make, key):
      with nnx.use_eager_sharding(False):
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))

    keys = jax.random.split(key, 1 + len(builders))
    params = fresh(lambda rngs: UAE(uae_config, rngs=rngs), keys[0])
    names = sorted(builders)
    return {**params, "encoders": {n: fresh(builders[n], k) for n, k in zip(names, keys[1:], strict=True)}}

  make_text_tower = None
  if config.model == SMALL_WORLD:
    text = scenes.clip_text(processor.vocab_size, config.data.caption_tokens, processor.end_ids[0])

    def make_text_tower(rngs: nnx.Rngs) -> CLIPText:
      return CLIPText(text, rngs=rngs)

  buffers = frozenset(path for path, _ in trees.items(buffer_tree(uae_config)))
  return Built(
    networks=Networks(graphdef, prompts, encoders),
    processor=processor,
    abstract_params={**abstract_uae, "encoders": abstract_encoders},
    buffers=buffers,
    init=init,
    make_text_tower=make_text_tower,
  )


def buffer_tree(config: UAEConfig) -> dict:
  """The stored constants of a UAE, abstractly."""
  with nnx.use_eager_sharding(False):
    model = nnx.eval_shape(lambda: UAE(config, rngs=nnx.Rngs(0)))
  return nnx.to_pure_dict(nnx.state(model, Buffer))

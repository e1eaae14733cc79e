"""Our networks, weights and states of a size, and the files from which PyTorch reads the same weights.

python -m benchmarks.world DIR small        writes DIR/small
"""

from collections.abc import Callable
import dataclasses
import functools
import json
from pathlib import Path
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from benchmarks import inputs
from benchmarks.sizes import SIZES, Size, image_token, vocabulary
from uae_jax import sharding, trees
from uae_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.layers.lora import LoRA, is_adapter
from uae_jax.models.clip import CLIPVision, CLIPVisionConfig
from uae_jax.models.connector import ConnectorConfig
from uae_jax.models.dinov2 import DINOv2, DINOv2Config
from uae_jax.models.language import LanguageConfig
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.models.prompts import Prompts
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.qwen25_vl.vision import VisionConfig
from uae_jax.models.uae import UAE, UAEConfig
from uae_jax.models.vae import AutoencoderKLConfig
from uae_jax.networks import Networks
from uae_jax.options import OptimizerOptions
from uae_jax.small_world.processor import write_processor
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.state import State, create
from uae_jax.weights import clip, dinov2, export, huggingface_configs, tensor_files
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE

ENCODERS = {"clip": CLIPVision, "dinov2": DINOv2}
PIXELS = {"clip": (OPENAI_MEAN, OPENAI_STD), "dinov2": (IMAGENET_MEAN, IMAGENET_STD)}
LEARNING_RATE = 1e-4


def uae_config(size: Size, *, is_unrolled: bool = False, decoder_depth: int | None = None) -> UAEConfig:
  """Sizes of the five networks; `is_unrolled` unrolls layers, as in the small world (ignored at full size)."""
  adapters = dict(
    captioner_lora=LoRA(size.rank, size.alpha, targets="^language/layers/"),
    decoder_lora=LoRA(size.rank, size.alpha),
  )
  if size.networks == "full":
    make_config = {"sd35_medium": UAEConfig.uae_3b_sd35_medium, "sd35_large": UAEConfig.uae_3b_sd35_large}
    config = make_config[size.decoder](size.rank, size.alpha)
    remat = "full" if size.recomputes else "none"
    language = dataclasses.replace(config.captioner.language, remat=remat)
    return dataclasses.replace(
      config,
      captioner=dataclasses.replace(config.captioner, language=language),
      decoder=dataclasses.replace(config.decoder, remat=remat),
    )
  is_small = size.networks == "small"
  width, depth = (64, 2) if is_small else (512, 12)
  vision = VisionConfig(
    depth=2 if is_small else 8,
    width=64 if is_small else 384,
    num_heads=2 if is_small else 6,
    mlp_width=128 if is_small else 1024,
    out_width=width,
    full_attention_layers=(1,) if is_small else (3, 7),
    unroll=is_unrolled,
  )
  language = LanguageConfig(
    vocab_size=vocabulary(size),
    width=width,
    depth=depth,
    num_heads=width // 64,
    num_kv_heads=1 if is_small else 2,
    head_width=64,
    mlp_width=4 * width,
    mrope_sections=(8, 12, 12),
    ties_embeddings=True,
    unroll=is_unrolled,
  )
  decoder = MMDiTConfig(
    depth=decoder_depth or (2 if is_small else 8),
    num_heads=width // 64,
    head_width=64,
    patch=2,
    context_width=width,
    pooled_width=128,
    pos_embed_max_size=64,
    sample_size=64,
    dual_attention_layers=(0,) if size.is_dual else (),
    # Activations saved by a scan go through memory; recomputing them is no slower.
    remat="none" if is_unrolled else "dots",
    unroll=is_unrolled,
  )
  return UAEConfig(
    captioner=Qwen25VLConfig(vision, language, image_token(size)),
    connector=ConnectorConfig(width, 2 * width, width),
    decoder=decoder,
    vae=AutoencoderKLConfig(
      block_channels=(8, 16, 16, 16) if is_small else (32, 64, 128, 128),
      layers_per_block=1 if is_small else 2,
      norm_groups=4 if is_small else 16,
      scaling_factor=1.5305,
      shift_factor=0.0609,
    ),
    **adapters,
  )


def encoder_configs(size: Size, *, is_unrolled: bool = False) -> dict:
  """Sizes of CLIP ViT-L/14 and DINOv2-large, or of smaller ones; `is_unrolled` as in `uae_config`."""
  if size.networks == "full":
    return {"clip": CLIPVisionConfig.clip_vit_l14(), "dinov2": DINOv2Config.dinov2_large()}
  if size.networks == "small":
    common = dict(image_px=56, width=64, depth=2, num_heads=2, mlp_width=128, unroll=is_unrolled)
    return {
      "clip": CLIPVisionConfig(patch=14, projection_width=32, **common),
      "dinov2": DINOv2Config(patch=14, **common),
    }
  return {
    "clip": CLIPVisionConfig(
      image_px=224,
      patch=32,
      width=768,
      depth=12,
      num_heads=12,
      mlp_width=3072,
      activation="quick_gelu",
      projection_width=512,
      unroll=is_unrolled,
    ),
    "dinov2": DINOv2Config(
      image_px=224, patch=14, width=384, depth=12, num_heads=6, mlp_width=1536, unroll=is_unrolled
    ),
  }


def prompts(size: Size) -> Prompts:
  """Prompt templates with an end token that does not exist, so that every caption has its full length."""
  before, after, negative = inputs.generation_template(size)
  side = size.caption_px // inputs.PATCH_PX // inputs.MERGE
  return Prompts(
    caption=inputs.caption_prompt(size),
    generation_prefix=before,
    generation_suffix=after,
    negative=negative,
    image_grid=(side, side),
    pad=0,
    end=(vocabulary(size),),
    control=(),
    vocab_size=vocabulary(size),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """The networks of a size.

  Attributes:
    size: sizes of networks and workload.
    config: sizes of the UAE.
    networks: graph definitions and prompts.
    abstract: shapes of all parameters.
    needs: prefixes of the paths of the parameters that are used; the others are scalars, which take no memory.
  """

  size: Size
  config: UAEConfig
  networks: Networks
  abstract: dict
  needs: tuple[str, ...] = ("",)

  @functools.cached_property
  def params(self) -> dict:
    """Random weights, the same in every process; adapters are nonzero."""
    unused = {path: jnp.zeros(()) for path, _ in trees.items(self.abstract) if not path.startswith(self.needs)}
    return trees.from_items([*trees.items(self.draw(lambda path: path not in unused)), *unused.items()])

  def draw(self, is_wanted: Callable[[str], bool]) -> dict:
    """Draws the weights whose path is wanted."""
    leaves = {}
    for i, (path, leaf) in enumerate(trees.items(self.abstract)):
      if is_wanted(path):
        dtype = jnp.float32 if is_adapter(path) else jnp.dtype(self.size.dtype)
        leaves[path] = _draw(i, path, leaf.shape, dtype, self)
    return trees.from_items(leaves.items())

  @functools.cached_property
  def optimizer(self):
    return make_optimizer(OptimizerOptions(learning_rate=LEARNING_RATE, schedule="constant", warmup_percent=0.0), 1000)

  def state(self, net: str, params: dict | None = None) -> State:
    """Initial state of a stage that trains the adapters of `net`, as a copy because updates donate it.

    `params` replaces the parameters of this world.
    """
    state = create(
      self.params if params is None else params,
      lambda path: path.startswith(net) and is_adapter(path),
      self.optimizer,
      jax.random.key(1),
      has_ema=False,
    )
    return state.replace(trainable=jax.tree.map(jnp.copy, state.trainable))


def _draw(number: int, path: str, shape: tuple, dtype, world: World) -> jax.Array:
  """Draws one leaf: weights of order 1 / sqrt(fan_in), scales near 1, everything else small."""
  if path.endswith(("latent_scaling", "latent_shift")):
    config = world.config.vae
    value = config.scaling_factor if path.endswith("scaling") else config.shift_factor
    return jnp.full(shape, value, jnp.float32)
  mean, deviation = float(path.endswith("scale")), 0.02
  if path.endswith("kernel"):
    deviation = (np.prod(shape[:-1]) if len(shape) == 4 else shape[-2]) ** -0.5
  # numpy draws a leaf faster than XLA compiles a program for its shape.
  if world.size.shares_weights:
    noise = np.random.default_rng(number).standard_normal(shape, np.float32)
    return jnp.asarray(mean + np.float32(deviation) * noise, dtype)
  return jnp.asarray(np.resize(_block(mean, float(deviation), str(dtype))[number:], shape))


@functools.cache
def _block(mean: float, deviation: float, dtype: str) -> np.ndarray:
  """A block of noise that fills large leaves by repetition: drawing billions of values would take minutes."""
  return (mean + np.float32(deviation) * _noise()).astype(dtype)


@functools.cache
def _noise() -> np.ndarray:
  return np.random.default_rng(0).standard_normal(2**22 + 17, np.float32)


def make(
  size: Size,
  *,
  mesh: Mesh | None = None,
  is_unrolled: bool = False,
  decoder_depth: int | None = None,
  needs: tuple[str, ...] = ("",),
) -> World:
  """Makes a world without allocating arrays, on one device by default; other arguments as in `uae_config`."""
  from flax import nnx

  config = uae_config(size, is_unrolled=is_unrolled, decoder_depth=decoder_depth)
  mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  graphdef, abstract = sharding.abstract_model(lambda: UAE(config, rngs=nnx.Rngs(0)), mesh)
  embedders, abstract_embedders = {}, {}
  for name, encoder in encoder_configs(size, is_unrolled=is_unrolled).items():
    encoder_graphdef, abstract_embedders[name] = sharding.abstract_model(
      lambda n=name, c=encoder: ENCODERS[n](c, rngs=nnx.Rngs(0)), mesh
    )
    side = inputs.EMBEDDER_PX if size.networks == "full" else encoder.image_px
    embedders[name] = EmbeddingNetwork(name, encoder_graphdef, side, *PIXELS[name])
  networks = Networks(graphdef, prompts(size), embedders)
  return World(size, config, networks, {**abstract, "embedders": abstract_embedders}, needs)


def write(size: Size, folder: Path) -> None:
  """Writes the files for PyTorch: `config.json`, and the weights if they are shared."""
  if not size.shares_weights:
    _write_configs(size, folder)
    return
  world = make(size)
  processor = folder / "processor"
  write_processor(processor)
  inference = InferenceSettings(
    text_tower="reference",
    resolution_px=size.image_px,
    guidance=size.guidance,
    steps=size.sampling_steps,
    max_new_tokens=size.caption_tokens,
  )
  tokens = SimpleNamespace(end_ids=(3,), pad_id=0)
  loaded = LoadedUAE(world.config, world.networks.graphdef, world.params, tokens, processor, inference)
  export.write_uae(folder, loaded, merged=False)
  _write_configs(size, folder)
  embedders = world.params["embedders"]
  for name, table in (
    ("clip", clip.vision_table(encoder_configs(size)["clip"])),
    ("dinov2", dinov2.table(encoder_configs(size)["dinov2"], v5=True)),
  ):
    tensor_files.write(folder / name / "model.safetensors", export.Dump(embedders[name], table))


def _write_configs(size: Size, folder: Path) -> None:
  """Writes `config.json` of every network, in the format of its library."""
  config, embedders = uae_config(size), encoder_configs(size)
  clip_config, dino = embedders["clip"], embedders["dinov2"]
  common = {
    name: dict(
      image_size=encoder.image_px,
      patch_size=encoder.patch,
      hidden_size=encoder.width,
      num_hidden_layers=encoder.depth,
      num_attention_heads=encoder.num_heads,
    )
    for name, encoder in embedders.items()
  }
  files = {
    "llm_model": huggingface_configs.qwen25_vl(config.captioner, size.dtype)
    | {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 0}
    # Older versions of transformers count the images of a prompt by these (`inputs.caption_prompt`).
    | {"vision_start_token_id": image_token(size) - 3, "vision_end_token_id": image_token(size) - 2},
    "dit": huggingface_configs.mmdit(config.decoder),
    "SD3/vae": huggingface_configs.autoencoder_kl(config.vae, config.vae.scaling_factor, config.vae.shift_factor),
    "clip": common["clip"]
    | dict(
      intermediate_size=clip_config.mlp_width,
      projection_dim=clip_config.projection_width,
      hidden_act=clip_config.activation,
    ),
    "dinov2": common["dinov2"] | dict(mlp_ratio=dino.mlp_width // dino.width),
    "connector": dataclasses.asdict(config.connector),
  }
  for name, settings in files.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
  for name in sys.argv[2:]:
    write(SIZES[name], Path(sys.argv[1]) / name)

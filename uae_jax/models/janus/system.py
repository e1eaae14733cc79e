"""Janus as a system: one network reads images and writes them, and its captions are between the two."""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax

from uae_jax.layers import lora
from uae_jax.models.janus.model import Janus, JanusConfig

# A token is drawn with two uniform numbers, one for its group of codes and one for the code in the group.
NUMBERS_PER_TOKEN = 2


@dataclasses.dataclass(frozen=True)
class JanusSystemConfig:
  """Architecture of Janus and its adapters.

  Attributes:
    captioner: the whole network, which also generates images.
    captioner_lora: adapters of its language model, or None.
  """

  captioner: JanusConfig
  captioner_lora: lora.LoRA | None = None

  generates_by_captioner: ClassVar[bool] = True
  # Options of generation by a diffusion model.
  inert_options: ClassVar[tuple[str, ...]] = (
    "conditioning",
    "sampler_steps",
    "shift",
    "is_shift_by_size",
    "guidance_interval",
  )

  @classmethod
  def janus_pro_1b(cls, rank: int = 32, alpha: float = 64.0) -> "JanusSystemConfig":
    """Janus-Pro-1B, with adapters as in the paper's system."""
    return cls(JanusConfig.janus_pro_1b()).with_adapters(lora.LoRA(rank, alpha))

  @classmethod
  def janus_pro_7b(cls, rank: int = 32, alpha: float = 64.0) -> "JanusSystemConfig":
    """Janus-Pro-7B, with adapters as in the paper's system."""
    return cls(JanusConfig.janus_pro_7b()).with_adapters(lora.LoRA(rank, alpha))

  @property
  def decoder_lora(self) -> None:
    """There is no other network with adapters."""
    return None

  @property
  def masks_padding(self) -> bool:
    """Always: the language model generates images as it continues texts."""
    return True

  @property
  def heads(self) -> dict[str, int]:
    return dict(self.captioner.heads)

  def build(self, rngs: nnx.Rngs) -> "JanusSystem":
    """The module of these sizes, with random weights."""
    return JanusSystem(self, rngs=rngs)

  def with_remat(self, policy: str) -> "JanusSystemConfig":
    """A copy with the rematerialization policy `policy`, a key of `layers.stack.REMAT_POLICIES`."""
    return dataclasses.replace(self, captioner=self.captioner.with_remat(policy))

  def with_adapters(self, adapters: lora.LoRA) -> "JanusSystemConfig":
    """A copy with adapters if there are none."""
    own = self.captioner_lora or lora.LoRA(adapters.rank, adapters.alpha, self.captioner.adapter_targets)
    return dataclasses.replace(self, captioner_lora=own)

  def latents_shape(self, height: int, width: int) -> tuple[int, int, int]:
    """Shape (h, w, 2) of the noise of an image of height x width pixels; see `rollouts.image_tokens.generate`.

    Raises:
      ValueError: the image has another size than those that the model reads and writes.
    """
    side = self.captioner.vision.image_px
    if (height, width) != (side, side):
      raise ValueError(f"{height} x {width} px: the model makes images of {side} x {side}")
    return (*self.captioner.image_grid, NUMBERS_PER_TOKEN)

  def decoder_tokens(self, height: int, width: int) -> int:
    """Tokens per image, of any size."""
    del height, width
    return self.captioner.num_image_tokens


class JanusSystem(nnx.Module):
  """The module of a `JanusSystemConfig`; a `models.system.System`."""

  def __init__(self, config: JanusSystemConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.captioner: Janus = config.captioner.build(rngs)
    if config.captioner_lora is not None:
      lora.attach(self.captioner, config.captioner_lora, rngs=rngs)

  def encode_text(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Token embeddings of templated prompts, int32[B, T] -> float[B, T, D]; the language model continues them."""
    del mask
    return self.captioner.embed(tokens)

  def latents_shape(self, images: jax.Array) -> tuple[int, int, int]:
    """Shape (h, w, 2) of the noise of images [..., P, P, 3]."""
    return self.config.latents_shape(images.shape[-3], images.shape[-2])

  def decode_tokens(self, tokens: jax.Array) -> jax.Array:
    """Images from tokens: int32[B, num_image_tokens] -> float32[B, P, P, 3], nominally in [-1, 1], not clamped."""
    return self.captioner.vq.decode(tokens, self.config.captioner.image_grid).astype("float32")

  def autoencode(self, images: jax.Array) -> jax.Array:
    """Images through the tokenizer: float[B, P, P, 3] in [-1, 1] -> the same, not clamped."""
    vq = self.captioner.vq
    return self.decode_tokens(vq.encode(images.astype(vq.codebook.dtype)))

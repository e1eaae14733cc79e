"""The interface of a system: a captioner, and what generates images from its captions."""

from typing import Any, ClassVar, Protocol

from flax import nnx
import jax

from uae_jax.layers.lora import LoRA
from uae_jax.models.captioner import Captioner, CaptionerConfig

# Names that the parts of a system have in a tree of parameters, beside those of embedders and of what a stage adds.
NETS = ("captioner", "connector", "decoder", "vae", "pooled")


def nets_of(params: dict) -> dict:
  """The parts of a tree of parameters that belong to the system."""
  return {net: params[net] for net in NETS if net in params}


class SystemConfig(Protocol):
  """Architecture of a whole system: a frozen dataclass, stored as JSON; its kind is a row of `models.systems`.

  Attributes:
    captioner: architecture of the captioner.
    captioner_lora: adapters of the captioner, or None.
    decoder_lora: adapters of a decoder of its own, or None.
    heads: name of each network -> number of its attention heads, which the mesh's `tensor` must divide.
    masks_padding: whether padding of a prompt does not change the image.
    generates_by_captioner: whether the captioner's own weights generate images, so that training it changes both.
    inert_options: names of `options.GenerationOptions` that change nothing.
  """

  generates_by_captioner: ClassVar[bool]
  inert_options: ClassVar[tuple[str, ...]]

  @property
  def captioner(self) -> CaptionerConfig: ...

  @property
  def captioner_lora(self) -> LoRA | None: ...

  @property
  def decoder_lora(self) -> LoRA | None: ...

  @property
  def masks_padding(self) -> bool: ...

  @property
  def heads(self) -> dict[str, int]: ...

  def build(self, rngs: nnx.Rngs) -> Any:
    """The `System` of these sizes, an `nnx.Module`, with random weights."""
    ...

  def with_remat(self, policy: str) -> "SystemConfig":
    """A copy with the rematerialization policy `policy`, a key of `layers.stack.REMAT_POLICIES`."""
    ...

  def with_adapters(self, adapters: LoRA) -> "SystemConfig":
    """A copy with adapters of this rank and alpha where it has none; existing adapters are left unchanged."""
    ...

  def latents_shape(self, height: int, width: int) -> tuple[int, int, int]:
    """Shape (h, w, C) of the latents, and of the noise, of an image of height x width pixels.

    Raises:
      ValueError: there are no images of this size.
    """
    ...

  def decoder_tokens(self, height: int, width: int) -> int:
    """Tokens per image of height x width pixels in what generates it."""
    ...


class System(Protocol):
  """The module of a `SystemConfig`; `rollouts.systems` has the sampler of its images.

  Attributes:
    captioner: describes images.
  """

  @property
  def config(self) -> SystemConfig: ...

  @property
  def captioner(self) -> Captioner: ...

  def encode_text(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """What images are generated from: templated prompts int32[B, T] with mask bool[B, T] -> float[B, T, C]."""
    ...

  def latents_shape(self, images: jax.Array) -> tuple[int, int, int]:
    """Shape (h, w, C) of the latents of images [..., H, W, 3]."""
    ...

  def autoencode(self, images: jax.Array) -> jax.Array:
    """Images through the codec of the latents: float[B, H, W, 3] in [-1, 1] -> the same, not clamped."""
    ...

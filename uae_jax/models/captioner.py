"""The interface of a captioner. Positions and caches are opaque: only the captioner that made them reads them."""

from collections.abc import Mapping
from typing import Any, Protocol

from flax import nnx
import jax

from uae_jax.models.prompts import Prompts, Questions


class CaptionerConfig(Protocol):
  """Sizes of a captioner: a frozen dataclass, stored as JSON; its kind is a row of `models.captioners`.

  Attributes:
    vocab_size: V, size of the logits' last axis.
    patch_size: side of an image patch, in pixels.
    heads: name of each network -> number of its attention heads, which the mesh's `tensor` must divide.
    adapter_targets: `layers.lora.LoRA.targets` of the layers that are adapted by default.
  """

  @property
  def vocab_size(self) -> int: ...

  @property
  def patch_size(self) -> int: ...

  @property
  def heads(self) -> Mapping[str, int]: ...

  @property
  def adapter_targets(self) -> str: ...

  def build(self, rngs: nnx.Rngs) -> "Captioner":
    """The module of these sizes, an `nnx.Module`, with random weights."""
    ...

  def with_remat(self, policy: str) -> "CaptionerConfig":
    """A copy of the config with the rematerialization policy `policy`, a key of `layers.stack.REMAT_POLICIES`."""
    ...


class TokenModel(Protocol):
  """The part of a captioner that continues a prefix, token by token."""

  @property
  def vocab_size(self) -> int: ...

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token embeddings: int32[...] -> float[..., D]."""
    ...

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Next-token logits of states after the final norm: float[..., D] -> float32[..., V]."""
    ...

  def continuation_positions(
    self, next_position: jax.Array, start: jax.Array | int, num_rollouts: int, length: int
  ) -> jax.Array:
    """Positions of tokens [start, start + length) of each of `num_rollouts` continuations per prompt."""
    ...

  def init_suffix(self, batch: int, rollouts: int, length: int, dtype: Any = ...) -> Any:
    """An empty cache of `length` slots for each of `rollouts` continuations of `batch` prompts."""
    ...

  def extend(
    self, embeddings: jax.Array, positions: jax.Array, prefix: Any, suffix: Any = None, start: jax.Array | int = 0
  ) -> tuple[jax.Array, Any]:
    """Runs T more tokens of each of R rollouts, float[B, R, T, D], over the shared prefix.

    Returns:
      (states float[B, R, T, D] after the final norm, the suffix with T more tokens or None if no suffix was given).
    """
    ...

  def for_decoding(self) -> "TokenModel":
    """The same function, prepared for a loop over tokens: weights all-gathered once, layers unstacked if unrolled."""
    ...


class Captioner(TokenModel, Protocol):
  """Reads images, predicts captions, and encodes text for the decoder."""

  @property
  def config(self) -> CaptionerConfig: ...

  def prompt(
    self, prompts: Prompts, images: jax.Array, questions: Questions | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeds the image and the question of every row.

    Args:
      prompts: the templates rendered for this image size.
      images: uint8[B, h, w, 3].
      questions: a prompt per row; by default all rows have `prompts.caption`.

    Returns:
      (embeddings float[B, P, D], positions, mask bool[B, P]).
    """
    ...

  def prefill(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """(states float[B, P, D], the cache that `extend` continues); a suffix should have the `dtype` of the cache."""
    ...

  def next_position(self, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """int32[B]: where continuations of the prompts start."""
    ...

  def text_positions(self, mask: jax.Array) -> jax.Array:
    """Positions of rows without images, given their mask bool[B, T]."""
    ...

  def states(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """States float[B, T, D] of whole rows, after the final norm, without a cache."""
    ...

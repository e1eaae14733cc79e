"""The part of a `models.captioner.Captioner` that is the same for every captioner with a `LanguageModel`."""

import dataclasses
from typing import Any, Self

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.models.language import LanguageConfig, LanguageModel, PrefixCache, SuffixCache
from uae_jax.models.positions import next_position, text_positions


@dataclasses.dataclass(frozen=True)
class LanguageCaptionerConfig:
  """The part of a `models.captioner.CaptionerConfig` that is the same for all of them; subclasses have the size of a
  patch, and build the module.

  Attributes:
    vision: architecture of the tower that reads images; a dataclass with `num_heads` and `remat`.
    language: architecture of the language model.
    image_token_id: id of the placeholder token, whose embeddings are replaced by those of an image.
  """

  vision: Any
  language: LanguageConfig
  image_token_id: int

  def __post_init__(self):
    if not 0 <= self.image_token_id < self.language.vocab_size:
      raise ValueError(f"image_token_id {self.image_token_id} is not in a vocabulary of {self.language.vocab_size}")

  @property
  def vocab_size(self) -> int:
    return self.language.vocab_size

  @property
  def heads(self) -> dict[str, int]:
    return {"vision": self.vision.num_heads, "language": self.language.num_heads}

  @property
  def adapter_targets(self) -> str:
    return "^language/layers/"

  def with_remat(self, policy: str) -> Self:
    """A copy with the rematerialization policy `policy`, a key of `layers.stack.REMAT_POLICIES`."""
    return dataclasses.replace(
      self,
      vision=dataclasses.replace(self.vision, remat=policy),
      language=dataclasses.replace(self.language, remat=policy),
    )


class LanguageCaptioner(nnx.Module):
  """Continues prompts by its language model; subclasses set the attributes and embed images in `prompt`.

  Attributes:
    config: sizes of the whole captioner.
    language: the language model.
  """

  config: LanguageCaptionerConfig
  language: LanguageModel

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token embeddings, int32[...] -> float[..., D], in the dtype of the table."""
    return self.language.embed(tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Next-token logits of states after the final norm: float[..., D] -> float32[..., V]."""
    return self.language.logits(hidden)

  def states(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """States float[B, T, D] of whole rows, after the final norm; see `LanguageModel.__call__`."""
    return self.language(embeddings, positions, mask)

  def prefill(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> tuple[jax.Array, PrefixCache]:
    """As `states`, but also returns the keys and values for `extend`."""
    return self.language.prefill(embeddings, positions, mask)

  def extend(
    self,
    embeddings: jax.Array,
    positions: jax.Array,
    prefix: PrefixCache,
    suffix: SuffixCache | None = None,
    start: jax.Array | int = 0,
  ) -> tuple[jax.Array, SuffixCache | None]:
    """Runs T more tokens of each of R rollouts per prompt; see `LanguageModel.extend`."""
    return self.language.extend(embeddings, positions, prefix, suffix, start)

  def init_suffix(self, batch: int, rollouts: int, length: int, dtype=jnp.float32) -> SuffixCache:
    """An empty cache of `length` slots for each of `rollouts` continuations of `batch` prompts."""
    return self.language.init_suffix(batch, rollouts, length, dtype)

  def next_position(self, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """The position int32[B] where a row's continuations start: one after its largest position."""
    return next_position(positions, mask)

  def continuation_positions(
    self, next_position: jax.Array, start: jax.Array | int, num_rollouts: int, length: int
  ) -> jax.Array:
    """Positions int32[3, B, R, T] of tokens [start, start + length) of each continuation; next_position: int32[B]."""
    return self.language.continuation_positions(next_position, start, num_rollouts, length)

  def text_positions(self, mask: jax.Array) -> jax.Array:
    """Positions int32[3, B, T] of rows without images, given their mask bool[B, T]."""
    return text_positions(mask)

  def for_decoding(self) -> LanguageModel:
    """The language model alone, prepared for a loop over tokens; see `LanguageModel.for_decoding`."""
    return self.language.for_decoding()

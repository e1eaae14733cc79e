"""The language model of Qwen2.5-VL: grouped-query attention, multimodal rotary positions, rollouts on a shared prefix.

Source: transformers 5.23 modeling_qwen2_5_vl.py, Qwen2_5_VLTextModel. Letters: see layers/__init__.py.

Three ways through the same layers: `__call__` runs whole sequences; `prefill` does the same and keeps keys and values;
`extend` continues R sequences a prompt over that prefix, either whole continuations at once (teacher forcing,
differentiable) or a few tokens at a time into a cache. Caches are arguments and results, never state.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import nnx
import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.layers import rope
from uae_jax.layers.attention import attend, attend_shared_prefix
from uae_jax.layers.lora import Linear
from uae_jax.layers.mlp import GatedMLP
from uae_jax.layers.norms import RMSNorm
from uae_jax.layers.stack import scan_layers, stack, unstack
from uae_jax.sharding import constrain, gather, gathered


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
  """Architecture of the language model.

  Attributes:
    vocab_size: V; published files pad it beyond the tokenizer.
    width: D.
    depth: number of layers.
    num_heads: N.
    num_kv_heads: K.
    head_width: H.
    mlp_width: F.
    rope_theta: base of the rotary frequencies.
    mrope_sections: rotary frequencies that turn with time, row and column; together H / 2.
    ties_embeddings: logits are made with the embedding table instead of a head of their own.
    norm_eps: of every norm.
    remat: a key of `layers.stack.REMAT_POLICIES`.
    unroll: writes the layers out instead of scanning them.
  """

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  mlp_width: int
  rope_theta: float = 1e6
  mrope_sections: tuple[int, int, int] = (16, 24, 24)
  ties_embeddings: bool = False
  norm_eps: float = 1e-6
  remat: str = "none"
  unroll: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
    if len(self.mrope_sections) != 3 or 2 * sum(self.mrope_sections) != self.head_width:
      raise ValueError(f"mrope_sections {self.mrope_sections} do not add up to half the head_width {self.head_width}")

  @classmethod
  def qwen25_3b(cls) -> "LanguageConfig":
    """Source: config.json of Qwen/Qwen2.5-VL-3B-Instruct."""
    return cls(
      vocab_size=151936,
      width=2048,
      depth=36,
      num_heads=16,
      num_kv_heads=2,
      head_width=128,
      mlp_width=11008,
      ties_embeddings=True,
    )

  @classmethod
  def qwen25_7b(cls) -> "LanguageConfig":
    """Source: config.json of Qwen/Qwen2.5-VL-7B-Instruct."""
    return cls(
      vocab_size=152064,
      width=3584,
      depth=28,
      num_heads=28,
      num_kv_heads=4,
      head_width=128,
      mlp_width=18944,
      ties_embeddings=False,
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "LanguageConfig":
    """From a whole `config.json`: flat as transformers 4.50 wrote it, or with `text_config`.

    Raises:
      ValueError: the file describes something this class is not.
    """
    text = config.get("text_config") or config
    parameters = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 1e6)} | (
      text.get("rope_scaling") or {}
    )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "mrope"):
      raise ValueError(f"rope type {kind!r} is not known; expected 'default' or 'mrope'")
    if text.get("use_sliding_window"):
      raise ValueError("use_sliding_window is true: sliding windows are not supported")
    if text.get("hidden_act", "silu") != "silu":
      raise ValueError(f"hidden_act {text['hidden_act']!r} is not known; expected 'silu'")
    return cls(
      vocab_size=text["vocab_size"],
      width=text["hidden_size"],
      depth=text["num_hidden_layers"],
      num_heads=text["num_attention_heads"],
      num_kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
      head_width=text["hidden_size"] // text["num_attention_heads"],
      mlp_width=text["intermediate_size"],
      rope_theta=parameters.get("rope_theta", 1e6),
      mrope_sections=tuple(parameters.get("mrope_section", (16, 24, 24))),
      ties_embeddings=config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False),
      norm_eps=text.get("rms_norm_eps", 1e-6),
    )


@flax.struct.dataclass
class PrefixCache:
  """Keys and values of prompts, shared by all rollouts of a prompt.

  Attributes:
    k: float[L, B, P, K, H], rotated.
    v: float[L, B, P, K, H].
    mask: bool[B, P]; False at padding.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array

  @property
  def dtype(self) -> jnp.dtype:
    """Of keys and values."""
    return self.k.dtype


@flax.struct.dataclass
class SuffixCache:
  """Keys and values of what each rollout has written so far, S slots.

  Attributes:
    k: float[L, B, R, S, K, H], rotated.
    v: float[L, B, R, S, K, H].
  """

  k: jax.Array
  v: jax.Array

  def write(self, layer: jax.Array, start: jax.Array | int, k: jax.Array, v: jax.Array) -> "SuffixCache":
    """Puts float[B, R, T, K, H] of one layer at slots start .. start + T, in place inside a loop."""

    def update(cache, new):
      return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, 0, 0, start, 0, 0))

    return SuffixCache(update(self.k, k), update(self.v, v))

  def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(k, v) of one layer, float[B, R, S, K, H]."""
    return tuple(jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (self.k, self.v))


class Attention(nnx.Module):
  """Grouped-query attention; which keys a query sees is the caller's `attend`. The output has no bias."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    self.query = Linear(config.width, width, axes=("embed", "heads"), rngs=rngs)
    self.key = Linear(config.width, kv_width, axes=("embed", "kv_heads"), rngs=rngs)
    self.value = Linear(config.width, kv_width, axes=("embed", "kv_heads"), rngs=rngs)
    self.out = Linear(width, config.width, axes=("heads", "embed"), use_bias=False, rngs=rngs)
    self.head_width = config.head_width

  def __call__(self, x: jax.Array, rotation, attend: Callable):
    """`attend(q, k, v)` returns (attended float[..., T, N, H], anything); both go out, the first projected."""

    def heads(y, axis):
      y = y.reshape(*y.shape[:-1], -1, self.head_width)
      return constrain(y, "batch", *(None,) * (y.ndim - 4), "act_tokens", axis, None)

    q = rope.rotate(heads(self.query(x), "act_heads"), rotation)
    k = rope.rotate(heads(self.key(x), "kv_heads"), rotation)
    attended, kept = attend(q, k, heads(self.value(x), "kv_heads"))
    return self.out(attended.reshape(*x.shape[:-1], -1)), kept


class Block(nnx.Module):
  """float[..., T, D] -> (float[..., T, D], what `attend` keeps)."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
    self.mlp = GatedMLP(config.width, config.mlp_width, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array, rotation, attend: Callable):
    attended, kept = self.attention(self.attention_norm(x), rotation, attend)
    x = x + attended
    x = x + self.mlp(self.mlp_norm(x))
    return constrain(x, "batch", *(None,) * (x.ndim - 3), "act_tokens", "act_embed"), kept


class LanguageModel(nnx.Module):
  """Embeddings to hidden states to logits."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    shape, init = (config.vocab_size, config.width), nnx.initializers.normal(config.width**-0.5)
    self.embedding = nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=("vocab", "embed"))
    self.layers = stack(lambda r: Block(config, rngs=r), config.depth, rngs)
    self.norm = RMSNorm(config.width, eps=config.norm_eps)
    if not config.ties_embeddings:
      self.head = nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=("vocab", "embed"))
    self.config = config

  def embed(self, tokens: jax.Array) -> jax.Array:
    """int32[...] -> float[..., D] in the dtype of the table."""
    # Left alone, the partitioner replicates the result instead of gathering the table.
    table = gather(jnp.asarray(self.embedding[...]), "vocab", "embed")
    return constrain(table[tokens], "batch", *(None,) * (tokens.ndim - 1), "act_embed")

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float[..., D], after the final norm, -> float32[..., V]."""
    table = (self.embedding if self.config.ties_embeddings else self.head)[...].astype(hidden.dtype)
    table = gather(table, "vocab", "embed")
    return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)

  def __call__(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Whole sequences. Computes in the dtype of `embeddings`.

    Args:
      embeddings: float[B, T, D].
      positions: int32[3, B, T].
      mask: bool[B, T]; keys of padding are hidden, queries of padding still see the tokens of their row.

    Returns:
      float[B, T, D], after the final norm.
    """
    hidden, _ = self._whole(embeddings, positions, mask, keeps=False)
    return hidden

  def prefill(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> tuple[jax.Array, PrefixCache]:
    """As `__call__`, and the keys and values for `extend`."""
    hidden, (k, v) = self._whole(embeddings, positions, mask, keeps=True)
    return hidden, PrefixCache(k, v, mask)

  def _whole(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array, *, keeps: bool):
    key_mask = mask[:, None, None]

    def causal(q, k, v):
      return attend(q, k, v, mask=key_mask, is_causal=True), (k, v) if keeps else None

    rotation = self.rotation(positions)
    x, kept = self._scan(lambda x, block, _: block(x, rotation, causal), embeddings, None)
    return self.norm(x), kept

  def extend(
    self,
    embeddings: jax.Array,
    positions: jax.Array,
    prefix: PrefixCache,
    suffix: SuffixCache | None = None,
    start: jax.Array | int = 0,
  ) -> tuple[jax.Array, SuffixCache | None]:
    """T more tokens of each of R rollouts a prompt; the prefix is shared, never repeated.

    Args:
      embeddings: float[B, R, T, D].
      positions: int32[3, B, R, T].
      prefix: of the B prompts.
      suffix: what the rollouts wrote before; None where the T tokens are all there is.
      start: how many slots of the suffix are written; start + T must not exceed its length.

    Returns:
      (float[B, R, T, D] after the final norm, the suffix with T more tokens, or None).
    """
    length = embeddings.shape[2]
    rotation = self.rotation(positions)

    def over_prefix(q, k, v, prefix_k, prefix_v, mask):
      return attend_shared_prefix(q, prefix_k, prefix_v, k, v, prefix_mask=prefix.mask, mask=mask[None, None])

    if suffix is None:
      mask = jnp.tri(length, dtype=bool)

      def replay(x, block, layer):
        return block(x, rotation, lambda q, k, v: (over_prefix(q, k, v, *layer, mask), None))

      x, _ = self._scan(replay, embeddings, (prefix.k, prefix.v))
      return self.norm(x), None

    mask = jnp.arange(suffix.k.shape[3]) <= start + jnp.arange(length)[:, None]

    def decode(carry, block, layer):
      x, suffix = carry
      index, *layer_prefix = layer

      def write_and_attend(q, k, v):
        written = suffix.write(index, start, k, v)
        return over_prefix(q, *written.read(index), *layer_prefix, mask), written

      return block(x, rotation, write_and_attend), None

    (x, suffix), _ = self._scan(decode, (embeddings, suffix), (jnp.arange(self.config.depth), prefix.k, prefix.v))
    return self.norm(x), suffix

  def init_suffix(self, batch: int, rollouts: int, length: int, dtype=jnp.float32) -> SuffixCache:
    """An empty cache of `length` slots for each of `rollouts` continuations of `batch` prompts."""
    config = self.config
    shape = (config.depth, batch, rollouts, length, config.num_kv_heads, config.head_width)
    return SuffixCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def continuation_positions(
    self, next_position: jax.Array, start: jax.Array | int, num_rollouts: int, length: int
  ) -> jax.Array:
    """int32[3, B, R, T] of tokens start .. start + length of each continuation; next_position: int32[B]."""
    positions = next_position[:, None, None] + start + jnp.arange(length)
    return jnp.broadcast_to(positions, (3, next_position.shape[0], num_rollouts, length)).astype(jnp.int32)

  def for_decoding(self) -> "LanguageModel":
    """The same model with weights all-gathered over `fsdp`, and with layers unstacked if the config unrolls them.

    Otherwise a loop over tokens would gather every weight, and slice every layer from its stack, once per token.
    """
    model = gathered(self)
    if self.config.unroll:
      model.layers = unstack(model.layers)
    return model

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  def rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of int32[3, ..., T]."""
    return rope.rotation(rope.mrope_angles(positions, self.config.mrope_sections, self.config.rope_theta))

  def _scan(self, body: Callable, carry, xs):
    return scan_layers(body, carry, self.layers, xs, remat=self.config.remat, unroll=self.config.unroll or 1)

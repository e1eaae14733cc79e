"""The language model of the captioners: grouped-query attention, rotary positions, rollouts on a shared prefix.

Source: transformers 5.23 modeling_qwen2_5_vl.py, Qwen2_5_VLTextModel; with `qkv_bias` off and a single section of
positions, modeling_llama.py. Letters: see layers/__init__.py.

The same layers run in three modes: `__call__` runs whole sequences; `prefill` also returns their keys and values;
`extend` continues each prompt with R sequences over that prefix, either whole continuations at once (teacher forcing,
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
    vocab_size: V; larger than the tokenizer's vocabulary in published files, which pad it.
    width: D.
    depth: number of layers.
    num_heads: N.
    num_kv_heads: K.
    head_width: H.
    mlp_width: F.
    rope_theta: base of the rotary frequencies.
    mrope_sections: number of rotary frequencies for time, row and column; they add up to H / 2.
    ties_embeddings: compute logits with the embedding table instead of a separate head.
    qkv_bias: whether queries, keys and values have a bias; LLaMA's have none.
    norm_eps: epsilon of every norm.
    remat: a key of `layers.stack.REMAT_POLICIES`.
    unroll: unroll the layers instead of scanning them.
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
  qkv_bias: bool = True
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
    """Reads a complete `config.json`: flat, as transformers 4.50 wrote it, or with `text_config`.

    Raises:
      ValueError: the file describes an unsupported architecture.
    """
    text = config.get("text_config") or config
    parameters = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 1e6)} | (
      text.get("rope_scaling") or {}
    )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "mrope"):
      raise ValueError(f"rope type {kind!r} is not known; expected 'default' or 'mrope'")
    if set(text.get("layer_types") or ()) - {"full_attention"}:
      raise ValueError("layer_types names other layers than full_attention, which are not supported")
    head_width = text["hidden_size"] // text["num_attention_heads"]
    if text.get("head_dim") not in (None, head_width):
      raise ValueError(f"head_dim is {text['head_dim']}, transformers computes {head_width} for Qwen2.5-VL")
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
      head_width=head_width,
      mlp_width=text["intermediate_size"],
      rope_theta=parameters.get("rope_theta", 1e6),
      mrope_sections=tuple(parameters.get("mrope_section", (16, 24, 24))),
      ties_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
      norm_eps=text.get("rms_norm_eps", 1e-5),
    )


@flax.struct.dataclass
class PrefixCache:
  """Keys and values of prompts, shared by all rollouts of a prompt.

  Attributes:
    k: float[L, B, P, K, H], keys after the rotation.
    v: float[L, B, P, K, H], values.
    mask: bool[B, P]; False at padding.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of keys and values."""
    return self.k.dtype


@flax.struct.dataclass
class SuffixCache:
  """Keys and values of the tokens each rollout has generated so far, with room for S tokens.

  Attributes:
    k: float[L, B, R, S, K, H], keys after the rotation.
    v: float[L, B, R, S, K, H], values.
  """

  k: jax.Array
  v: jax.Array

  def write(self, layer: jax.Array, start: jax.Array | int, k: jax.Array, v: jax.Array) -> "SuffixCache":
    """Writes float[B, R, T, K, H] of one layer to slots [start, start + T); in place inside a loop."""

    def update(cache, new):
      return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, 0, 0, start, 0, 0))

    return SuffixCache(update(self.k, k), update(self.v, v))

  def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(k, v) of one layer, float[B, R, S, K, H]."""
    return tuple(jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (self.k, self.v))


class Attention(nnx.Module):
  """Grouped-query attention; the caller's `attend` determines which keys a query sees. The output has no bias."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    bias = config.qkv_bias
    self.query = Linear(config.width, width, axes=("embed", "heads"), use_bias=bias, rngs=rngs)
    self.key = Linear(config.width, kv_width, axes=("embed", "kv_heads"), use_bias=bias, rngs=rngs)
    self.value = Linear(config.width, kv_width, axes=("embed", "kv_heads"), use_bias=bias, rngs=rngs)
    self.out = Linear(width, config.width, axes=("heads", "embed"), use_bias=False, rngs=rngs)
    self.head_width = config.head_width

  def __call__(self, x: jax.Array, rotation, attend: Callable):
    """Returns (projection of the attended values, aux), where `attend(q, k, v)` gives (float[..., T, N, H], aux)."""

    def heads(y, axis):
      y = y.reshape(*y.shape[:-1], -1, self.head_width)
      return constrain(y, "batch", *(None,) * (y.ndim - 4), "act_tokens", axis, None)

    q = rope.rotate(heads(self.query(x), "act_heads"), rotation)
    k = rope.rotate(heads(self.key(x), "kv_heads"), rotation)
    attended, kept = attend(q, k, heads(self.value(x), "kv_heads"))
    return self.out(attended.reshape(*x.shape[:-1], -1)), kept


class Block(nnx.Module):
  """One transformer block: float[..., T, D] -> (float[..., T, D], the second result of `attend`)."""

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
  """The language model: token embeddings, transformer blocks and logits."""

  def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
    shape, init = (config.vocab_size, config.width), nnx.initializers.normal(config.width**-0.5)
    self.embedding = nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=("vocab", "embed"))
    self.layers = stack(lambda r: Block(config, rngs=r), config.depth, rngs)
    self.norm = RMSNorm(config.width, eps=config.norm_eps)
    if not config.ties_embeddings:
      self.head = nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=("vocab", "embed"))
    self.config = config

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token embeddings, int32[...] -> float[..., D], in the dtype of the table."""
    # Without these constraints the partitioner replicates the result instead of all-gathering the table.
    table = gather(jnp.asarray(self.embedding[...]), "vocab", "embed")
    return constrain(table[tokens], "batch", *(None,) * (tokens.ndim - 1), "act_embed")

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Next-token logits of states after the final norm: float[..., D] -> float32[..., V]."""
    table = (self.embedding if self.config.ties_embeddings else self.head)[...].astype(hidden.dtype)
    table = gather(table, "vocab", "embed")
    return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)

  def __call__(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Final states of whole sequences. Computes in the dtype of `embeddings`.

    Args:
      embeddings: float[B, T, D].
      positions: int32[3, B, T].
      mask: bool[B, T], False at padding; padding is masked as keys, but attends to the tokens of its row as queries.

    Returns:
      float[B, T, D], after the final norm.
    """
    hidden, _ = self._whole(embeddings, positions, mask, keeps=False)
    return hidden

  def prefill(self, embeddings: jax.Array, positions: jax.Array, mask: jax.Array) -> tuple[jax.Array, PrefixCache]:
    """As `__call__`, but also returns the keys and values for `extend`."""
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
    """Runs T more tokens of each of R rollouts per prompt; the prefix is shared, never repeated.

    Args:
      embeddings: float[B, R, T, D].
      positions: int32[3, B, R, T].
      prefix: cache of the B prompts.
      suffix: cache of the tokens generated before; None if the T tokens are the whole continuation.
      start: number of tokens already in the suffix; start + T must not exceed its length.

    Returns:
      (states float[B, R, T, D] after the final norm, the suffix with T more tokens or None).
    """
    length = embeddings.shape[2]
    rotation = self.rotation(positions)

    def over_prefix(q, k, v, prefix_k, prefix_v, *, mask):
      return attend_shared_prefix(q, prefix_k, prefix_v, k, v, prefix_mask=prefix.mask, mask=mask[None, None])

    if suffix is None:
      mask = jnp.tri(length, dtype=bool)

      def replay(x, block, layer):
        return block(x, rotation, lambda q, k, v: (over_prefix(q, k, v, *layer, mask=mask), None))

      x, _ = self._scan(replay, embeddings, (prefix.k, prefix.v))
      return self.norm(x), None

    mask = jnp.arange(suffix.k.shape[3]) <= start + jnp.arange(length)[:, None]

    def decode(carry, block, layer):
      x, suffix = carry
      index, *layer_prefix = layer

      def write_and_attend(q, k, v):
        written = suffix.write(index, start, k, v)
        return over_prefix(q, *written.read(index), *layer_prefix, mask=mask), written

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
    """Positions int32[3, B, R, T] of tokens [start, start + length) of each continuation; next_position: int32[B]."""
    positions = next_position[:, None, None] + start + jnp.arange(length)
    return jnp.broadcast_to(positions, (3, next_position.shape[0], num_rollouts, length)).astype(jnp.int32)

  def for_decoding(self) -> "LanguageModel":
    """The same model with weights all-gathered over `fsdp`, and layers unstacked if the config unrolls them.

    Otherwise a loop over tokens would all-gather every weight, and slice every layer from its stack, for each token.
    """
    model = gathered(self)
    if self.config.unroll:
      model.layers = unstack(model.layers)
    return model

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  def rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) for `rope.rotate` at positions int32[3, ..., T]."""
    return rope.rotation(rope.mrope_angles(positions, self.config.mrope_sections, self.config.rope_theta))

  def _scan(self, body: Callable, carry, xs):
    return scan_layers(body, carry, self.layers, xs, remat=self.config.remat, unroll=self.config.unroll or 1)

"""The single entry point to attention, and attention over a prefix that a group of rollouts shares.

Backends: "splash", the blocked TPU kernel, which never materializes the logits; "cudnn", the fused GPU kernel; "xla",
plain matrix products on any platform. The platform of the mesh decides; UAE_JAX_ATTENTION=xla overrides it for a whole
process.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from uae_jax.sharding import RULES

BACKENDS = ("splash", "cudnn", "xla")
OVERRIDE = "UAE_JAX_ATTENTION"
# Below this length the logits are small, and padding to blocks costs more than storing them.
SPLASH_MIN_TOKENS = 1024
SPLASH_BLOCKS = (512, 384, 256)
CUDNN_MAX_HEAD_WIDTH = 128


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  is_causal: bool = False,
  backend: str | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v, softmax in float32.

  Args:
    q: float[B, T, N, H].
    k: float[B, S, K, H]; K divides N (grouped queries).
    v: float[B, S, K, H].
    mask: bool, broadcastable to [B, N, T, S]; True where a query attends to a key. Every query needs at least one key.
    is_causal: query t attends to keys up to t; requires T = S.
    backend: one of `BACKENDS`; default: the best one for these shapes on the platform of the mesh.

  Returns:
    float[B, T, N, H] in the dtype of `q`.
  """
  backend = backend or choose_backend(q, k, mask)
  if backend == "splash":
    return splash(q, k, v, mask=mask, is_causal=is_causal)
  if backend == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation="cudnn")
  return dense(q, k, v, mask=mask, is_causal=is_causal)


@functools.cache
def backend_override() -> str | None:
  """The backend that UAE_JAX_ATTENTION names, or None.

  The variable is read once per process, at the first trace, so all programs of a process use the same value and later
  changes have no effect.

  Raises:
    ValueError: the variable does not name a backend.
  """
  override = os.environ.get(OVERRIDE) or None
  if override is not None and override not in BACKENDS:
    raise ValueError(f"{OVERRIDE}={override}: expected one of {', '.join(BACKENDS)}")
  return override


def choose_backend(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> str:
  """Chooses the backend for these shapes on the platform of the mesh being traced for.

  Raises:
    ValueError: UAE_JAX_ATTENTION does not name a backend.
  """
  override = backend_override()
  if override is not None:
    return override
  mesh = jax.sharding.get_abstract_mesh()
  # Not jax.default_backend(): a program for a TPU slice may be compiled on a machine without a TPU.
  device = None if mesh.empty else mesh.abstract_device
  platform = jax.default_backend() if device is None else device.platform
  is_key_mask = mask is None or (mask.ndim == 4 and mask.shape[1:3] == (1, 1))
  rows = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
  if platform == "tpu" and is_key_mask and min(q.shape[1], k.shape[1]) >= SPLASH_MIN_TOKENS and q.shape[0] % rows == 0:
    return "splash"
  is_half = q.dtype in (jnp.bfloat16, jnp.float16)
  # JAX refuses odd lengths with a mask when it differentiates through the kernel.
  is_even = mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
  if platform == "gpu" and is_half and is_even and q.shape[-1] % 8 == 0 and q.shape[-1] <= CUDNN_MAX_HEAD_WIDTH:
    return "cudnn"
  return "xla"


def dense(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, is_causal: bool) -> jax.Array:
  """Attention by two matrix products, with all logits in memory; arguments as for `attend`."""
  b, t, n, h = q.shape
  num_kv = k.shape[2]
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  q = q.reshape(b, num_kv, n // num_kv, t, h)
  logits = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * h**-0.5
  if is_causal:
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    mask = causal if mask is None else mask & causal
  if mask is not None:
    whole = jnp.broadcast_to(mask, (b, n, *logits.shape[-2:]))
    logits = jnp.where(whole.reshape(logits.shape), logits, jnp.finfo(jnp.float32).min)
  weights = exponentials(logits, jnp.max(logits, axis=-1))
  out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  out = out / jnp.sum(weights, axis=-1, keepdims=True)
  return out.reshape(b, n, t, h).swapaxes(1, 2).astype(q.dtype)


def exponentials(logits: jax.Array, highest: jax.Array) -> jax.Array:
  """exp(logits - highest), the unnormalized softmax: float32[..., S] from [..., S] and [...].

  The caller contracts over S and divides the result, which is smaller than the weights. `highest` cancels in that
  division and needs no gradient: on CPU the backward pass takes half the time of that through `softmax`.
  """
  return jnp.exp(logits - jax.lax.stop_gradient(highest)[..., None])


def splash(
  q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, is_causal: bool, interpret: bool = False
) -> jax.Array:
  """Splash attention on each device's own rows and heads; arguments as for `attend`, the mask bool[B, 1, 1, S].

  Args:
    interpret: run the kernel in interpret mode, which works on any platform; for tests.
  """
  mesh = jax.sharding.get_abstract_mesh()
  run = functools.partial(splash_rows, is_causal=is_causal, interpret=interpret)
  key_mask = jnp.ones(k.shape[:2], bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], k.shape[:2])
  if mesh.empty or mesh.size == 1:
    return run(q, k, v, key_mask)
  tensor = mesh.shape["tensor"]
  if tensor > 1 and k.shape[2] % tensor:
    # The key heads do not divide over the axis: give each query head its own copy.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  heads = PartitionSpec(RULES["batch"], None, RULES["act_heads"], None)
  specs = (heads, heads, heads, PartitionSpec(RULES["batch"], None))
  return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, key_mask)


def splash_rows(
  q: jax.Array, k: jax.Array, v: jax.Array, key_mask: jax.Array, *, is_causal: bool, interpret: bool
) -> jax.Array:
  """Runs the kernel on one device, with queries and keys padded to whole blocks; `key_mask` is bool[B, S]."""
  # Pallas is slow to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  length, keys = q.shape[1], k.shape[1]
  (q_block, q_length), (kv_block, kv_length) = padded_blocks(length), padded_blocks(keys)
  kind = splash_mask.CausalMask if is_causal else splash_mask.FullMask
  blocks = splash_kernel.BlockSizes(
    block_q=q_block,
    block_kv=kv_block,
    block_kv_compute=kv_block,
    block_q_dkv=q_block,
    block_kv_dkv=kv_block,
    block_kv_dkv_compute=kv_block,
    block_q_dq=q_block,
    block_kv_dq=kv_block,
  )
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([kind((q_length, kv_length))] * q.shape[2]),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def padded(x, size):
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

  # The kernel does not scale. Masked keys and padding form a segment that no query belongs to.
  q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  segments = splash_kernel.SegmentIds(
    q=jnp.ones((q.shape[0], q_length), jnp.int32),
    kv=jnp.pad(key_mask, ((0, 0), (0, kv_length - keys))).astype(jnp.int32),
  )
  out = jax.vmap(kernel)(padded(q, q_length), padded(k, kv_length), padded(v, kv_length), segments)
  return out.transpose(0, 2, 1, 3)[:, :length]


def padded_blocks(length: int) -> tuple[int, int]:
  """(block, padded length) with the least padding; ties go to the larger block."""
  return min(((block, -(-length // block) * block) for block in SPLASH_BLOCKS), key=lambda pair: (pair[1], -pair[0]))


def attend_shared_prefix(
  q: jax.Array,
  prefix_k: jax.Array,
  prefix_v: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  prefix_mask: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """Attention of R rollouts per prompt over one shared prefix and their own suffixes, without repeating the prefix.

  One softmax spans the logits of prefix and suffix, so the result equals attention over their concatenation.

  Args:
    q: float[B, R, T, N, H].
    prefix_k: float[B, P, K, H].
    prefix_v: float[B, P, K, H].
    k: float[B, R, S, K, H].
    v: float[B, R, S, K, H].
    prefix_mask: bool[B, P]; False at padding.
    mask: bool, broadcastable to [B, R, T, S]; True where a query attends to a suffix key.

  Returns:
    float[B, R, T, N, H].
  """
  b, r, t, n, h = q.shape
  num_kv = k.shape[-2]
  q = q.reshape(b, r, t, num_kv, n // num_kv, h)
  prefix_logits = jnp.einsum("BRTKGH,BPKH->BRKGTP", q, prefix_k, preferred_element_type=jnp.float32)
  suffix_logits = jnp.einsum("BRTKGH,BRSKH->BRKGTS", q, k, preferred_element_type=jnp.float32)
  lowest = jnp.finfo(jnp.float32).min
  prefix_logits = jnp.where(prefix_mask[:, None, None, None, None, :], prefix_logits * h**-0.5, lowest)
  suffix_logits = jnp.where(mask[:, :, None, None], suffix_logits * h**-0.5, lowest)
  highest = jnp.maximum(jnp.max(prefix_logits, axis=-1), jnp.max(suffix_logits, axis=-1))
  prefix, suffix = exponentials(prefix_logits, highest), exponentials(suffix_logits, highest)
  out = jnp.einsum(
    "BRKGTP,BPKH->BRKGTH", prefix.astype(q.dtype), prefix_v, preferred_element_type=jnp.float32
  ) + jnp.einsum("BRKGTS,BRSKH->BRKGTH", suffix.astype(q.dtype), v, preferred_element_type=jnp.float32)
  out = out / (jnp.sum(prefix, axis=-1) + jnp.sum(suffix, axis=-1))[..., None]
  return jnp.moveaxis(out, 4, 2).reshape(b, r, t, n, h).astype(q.dtype)

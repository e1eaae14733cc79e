"""Weight tables for diffusers' SD3Transformer2DModel and its PEFT adapters, to and from `models.mmdit`.

Source: diffusers 0.42 transformer_sd3.py; PEFT 0.21 `adapter_model.safetensors`.
"""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import re

from uae_jax.layers.lora import LoRA
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.weights.moves import CONV, TRANSPOSE, Reshape, Then
from uae_jax.weights.table import Row, linear, norm
from uae_jax.weights.tensor_files import count_indices, spec_of

IGNORED: dict[str, str] = {}
PEFT = "base_model.model."
POSITIONS = "pos_embed.pos_embed"

# (theirs, ours) of the linear layers outside the blocks.
OUTER = (
  ("time_text_embed.timestep_embedder.linear_1", "time_in"),
  ("time_text_embed.timestep_embedder.linear_2", "time_out"),
  ("time_text_embed.text_embedder.linear_1", "pooled_in"),
  ("time_text_embed.text_embedder.linear_2", "pooled_out"),
  ("context_embedder", "context_embed"),
  ("norm_out.linear", "out_modulation"),
  ("proj_out", "out"),
)
IMAGE = (
  ("norm1.linear", "image/modulation"),
  ("attn.to_q", "image/projections/query"),
  ("attn.to_k", "image/projections/key"),
  ("attn.to_v", "image/projections/value"),
  ("attn.to_out.0", "image/out"),
  ("ff.net.0.proj", "image/mlp_in"),
  ("ff.net.2", "image/mlp_out"),
)
CONTEXT_READ = (
  ("norm1_context.linear", "context/modulation"),
  ("attn.add_q_proj", "context/projections/query"),
  ("attn.add_k_proj", "context/projections/key"),
  ("attn.add_v_proj", "context/projections/value"),
)
CONTEXT_WRITTEN = (
  ("attn.to_add_out", "context/out"),
  ("ff_context.net.0.proj", "context/mlp_in"),
  ("ff_context.net.2", "context/mlp_out"),
)
DUAL = (
  ("attn2.to_q", "dual_projections/query"),
  ("attn2.to_k", "dual_projections/key"),
  ("attn2.to_v", "dual_projections/value"),
  ("attn2.to_out.0", "dual_out"),
)
NORMS = (
  ("attn.norm_q", "image/projections/query_norm"),
  ("attn.norm_k", "image/projections/key_norm"),
  ("attn.norm_added_q", "context/projections/query_norm"),
  ("attn.norm_added_k", "context/projections/key_norm"),
)
DUAL_NORMS = (
  ("attn2.norm_q", "dual_projections/query_norm"),
  ("attn2.norm_k", "dual_projections/key_norm"),
)


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive blocks that form one module here: a stack, or the last block alone."""

  theirs: str
  ours: str
  first: int
  count: int
  is_dual: bool
  is_last: bool


def groups(config: MMDiTConfig) -> list[Group]:
  num_dual, num_plain = config.num_dual, config.depth - 1 - config.num_dual
  blocks = "transformer_blocks.{layer}"
  stacks = (
    Group(blocks, "dual_layers", 0, num_dual, is_dual=True, is_last=False),
    Group(blocks, "layers", num_dual, num_plain, is_dual=False, is_last=False),
  )
  last = Group(f"transformer_blocks.{config.depth - 1}", "last", 0, 1, is_dual=config.last_is_dual, is_last=True)
  return [group for group in stacks if group.count] + [last]


def linears(config: MMDiTConfig) -> Iterator[tuple[str, str, int, int]]:
  """Yields (theirs, ours, first block, number of blocks) of linear layers, without the patch convolution."""
  for theirs, ours in OUTER:
    yield theirs, ours, 0, 1
  for group in groups(config):
    written, dual = () if group.is_last else CONTEXT_WRITTEN, DUAL if group.is_dual else ()
    for theirs, ours in IMAGE + CONTEXT_READ + written + dual:
      yield f"{group.theirs}.{theirs}", f"{group.ours}/{ours}", group.first, group.count


def modules(config: MMDiTConfig) -> Iterator[str]:
  """Yields the name of every linear layer, in diffusers' names."""
  for theirs, _, first, count in linears(config):
    yield from (theirs.replace("{layer}", str(block)) for block in range(first, first + count))


def size_problems(config: MMDiTConfig, tensors: Mapping) -> list[str]:
  """Sizes in a config that are not those of the tensors, and would be expanded."""
  problems, found = [], count_indices(tensors, "transformer_blocks.")
  if config.depth != found:
    problems.append(f"num_layers is {config.depth}, the tensors have {found} blocks")
  size = config.pos_embed_max_size
  table = spec_of(tensors, POSITIONS).shape if POSITIONS in tensors else ("no", "table")
  if len(table) < 2 or table[1] != size * size:
    problems.append(f"pos_embed_max_size is {size}, {POSITIONS} has the shape {table}")
  return problems


def flatten_patch(config: MMDiTConfig, out_features: int) -> Then:
  """The move from a convolution kernel, whose stride is its size, to a linear kernel on flattened patches."""
  patch, channels = config.patch, config.in_channels
  return Then((CONV, Reshape((patch, patch, channels, out_features), (patch * patch * channels, out_features))))


def table(config: MMDiTConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `MMDiT(config)`, and the position table."""
  width, size = config.width, config.pos_embed_max_size
  rows = [
    Row("pos_embed.proj.weight", "patch_embed/kernel", flatten_patch(config, width)),
    Row("pos_embed.proj.bias", "patch_embed/bias"),
    Row(POSITIONS, "position_table", Reshape((1, size * size, width), (size, size, width))),
  ]
  for theirs, ours, first, _ in linears(config):
    rows += linear(theirs, ours, first=first)
  if config.qk_norm:
    for group in groups(config):
      for theirs, ours in NORMS + (DUAL_NORMS if group.is_dual else ()):
        rows += norm(f"{group.theirs}.{theirs}", f"{group.ours}/{ours}", first=group.first)
  return tuple(rows)


def adapter_table(config: MMDiTConfig, lora: LoRA) -> tuple[Row, ...]:
  """Rows for the adapter leaves that `lora.attach(MMDiT(config), lora)` adds, in PEFT's names."""
  rows = []
  if re.search(lora.targets, "patch_embed"):
    one_by_one = Then((CONV, Reshape((1, 1, lora.rank, config.width), (lora.rank, config.width))))
    rows += [
      Row(f"{PEFT}pos_embed.proj.lora_A.weight", "patch_embed/lora_a", flatten_patch(config, lora.rank)),
      Row(f"{PEFT}pos_embed.proj.lora_B.weight", "patch_embed/lora_b", one_by_one),
    ]
  for theirs, ours, first, _ in linears(config):
    if re.search(lora.targets, ours):
      rows.append(Row(f"{PEFT}{theirs}.lora_A.weight", f"{ours}/lora_a", TRANSPOSE, first=first))
      rows.append(Row(f"{PEFT}{theirs}.lora_B.weight", f"{ours}/lora_b", TRANSPOSE, first=first))
  return tuple(rows)


def adapter_targets(config: MMDiTConfig, names: Collection[str]) -> str:
  """The `LoRA.targets` that matches the layers of an adapter file, given the names of its tensors.

  A stack is adapted if any of its blocks is; `table.find_problems` then reports blocks that the file lacks.
  """
  found = []
  for theirs, ours, first, count in (("pos_embed.proj", "patch_embed", 0, 1), *linears(config)):
    blocks = (theirs.replace("{layer}", str(block)) for block in range(first, first + count))
    if any(f"{PEFT}{block}.lora_A.weight" in names for block in blocks):
      found.append(ours)
  return f"^({'|'.join(found)})$"

"""Weight tables for transformers' Qwen2_5_VLForConditionalGeneration (4.50 and 5), to and from `models.qwen25_vl`."""

from collections.abc import Collection, Iterator
import re

from uae_jax.layers.lora import LoRA
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.qwen25_vl.vision import VisionConfig
from uae_jax.weights.moves import TRANSPOSE, Reshape, Then
from uae_jax.weights.table import Row, linear, norm
from uae_jax.weights.tensor_files import count_indices

# Style -> (prefix of the vision tower, prefix of the language model).
PREFIXES = {
  "official": ("visual.", "model."),
  "v5": ("model.visual.", "model.language_model."),
}
IGNORED = {
  r"^projector\.": "the connector's, stored beside the language model by UAE",
  r"^lm_head\.weight$": "a copy of the embedding table, where a model with tied embeddings was saved with its head",
  r"rotary_(pos_)?emb\.inv_freq$": "computed from the config",
}

# (theirs, ours, has bias) of the linear layers of a block.
VISION_LINEARS = (
  ("attn.qkv", "attention/qkv", True),
  ("attn.proj", "attention/out", True),
  ("mlp.gate_proj", "mlp/gate", True),
  ("mlp.up_proj", "mlp/up", True),
  ("mlp.down_proj", "mlp/down", True),
)
LANGUAGE_LINEARS = (
  ("self_attn.q_proj", "attention/query", True),
  ("self_attn.k_proj", "attention/key", True),
  ("self_attn.v_proj", "attention/value", True),
  ("self_attn.o_proj", "attention/out", False),
  ("mlp.gate_proj", "mlp/gate", False),
  ("mlp.up_proj", "mlp/up", False),
  ("mlp.down_proj", "mlp/down", False),
)


def patch_embed(config: VisionConfig) -> Then:
  """The move from a convolution over frames, rows and columns, with stride = size, to a kernel on flat patches."""
  side = config.patch_size
  kernel = (config.width, config.in_channels, config.temporal_patch, side, side)
  return Then((Reshape(kernel, (config.width, config.patch_values)), TRANSPOSE))


def table(config: Qwen25VLConfig, style: str = "official") -> tuple[Row, ...]:
  """Rows for every parameter of `Qwen25VL(config)`.

  Args:
    config: sizes, and whether the embeddings are tied.
    style: "official" for the names of transformers 4.50, `visual.*` and `model.layers.*`; "v5" for `model.visual.*` and
      `model.language_model.*`.
  """
  vision, language = PREFIXES[style]
  rows = [Row(f"{vision}patch_embed.proj.weight", "vision/patch_embed/kernel", patch_embed(config.vision))]
  block = f"{vision}blocks.{{layer}}."
  for theirs, ours, bias in VISION_LINEARS:
    rows += linear(block + theirs, f"vision/layers/{ours}", bias=bias)
  rows += norm(f"{block}norm1", "vision/layers/attention_norm")
  rows += norm(f"{block}norm2", "vision/layers/mlp_norm")
  rows += norm(f"{vision}merger.ln_q", "vision/merger/norm")
  rows += linear(f"{vision}merger.mlp.0", "vision/merger/up")
  rows += linear(f"{vision}merger.mlp.2", "vision/merger/down")

  block = f"{language}layers.{{layer}}."
  rows.append(Row(f"{language}embed_tokens.weight", "language/embedding"))
  for theirs, ours, bias in LANGUAGE_LINEARS:
    rows += linear(block + theirs, f"language/layers/{ours}", bias=bias)
  rows += norm(f"{block}input_layernorm", "language/layers/attention_norm")
  rows += norm(f"{block}post_attention_layernorm", "language/layers/mlp_norm")
  rows += norm(f"{language}norm", "language/norm")
  if not config.language.ties_embeddings:
    rows.append(Row("lm_head.weight", "language/head"))
  return tuple(rows)


def canonical(name: str) -> str:
  """The "official" name of a tensor in a model file, a PEFT adapter, or the full state of a PEFT model.

  `model.base_model.model.layers.0.self_attn.q_proj.base_layer.weight` -> `model.layers.0.self_attn.q_proj.weight`,
  `base_model.model.model.language_model.norm.weight` -> `model.norm.weight`.
  """
  for wrapped, plain in (("model.base_model.model.", "model."), ("base_model.model.", "")):
    if name.startswith(wrapped):
      name = plain + name.removeprefix(wrapped)
      break
  for new, old in (("model.visual.", "visual."), ("model.language_model.", "model."), ("layers.", "model.layers.")):
    if name.startswith(new):
      name = old + name.removeprefix(new)
      break
  name = re.sub(r"\.lora_(?:(A|down)|(B|up))\.(?:[^.]+\.)?weight$", _adapter_suffix, name)
  return name.replace(".base_layer.", ".")


def _adapter_suffix(found: re.Match) -> str:
  return f".lora_{'A' if found[1] else 'B'}.weight"


def size_problems(config: Qwen25VLConfig, tensors: Collection[str]) -> list[str]:
  """Numbers of layers in a config that are not those of the tensors, in "official" names."""
  vision, language = PREFIXES["official"]
  claims = (
    ("num_hidden_layers", config.language.depth, f"{language}layers."),
    ("vision_config.depth", config.vision.depth, f"{vision}blocks."),
  )
  return [
    f"{name} is {claimed}, the tensors have {found} layers"
    for name, claimed, prefix in claims
    if claimed != (found := count_indices(tensors, prefix))
  ]


def linears(config: Qwen25VLConfig, style: str = "official") -> Iterator[tuple[str, str, int]]:
  """Yields (theirs, ours, number of layers) of every linear layer that can have an adapter."""
  vision, language = PREFIXES[style]
  for theirs, ours, _ in VISION_LINEARS:
    yield f"{vision}blocks.{{layer}}.{theirs}", f"vision/layers/{ours}", config.vision.depth
  yield f"{vision}merger.mlp.0", "vision/merger/up", 1
  yield f"{vision}merger.mlp.2", "vision/merger/down", 1
  for theirs, ours, _ in LANGUAGE_LINEARS:
    yield f"{language}layers.{{layer}}.{theirs}", f"language/layers/{ours}", config.language.depth


def adapter_table(config: Qwen25VLConfig, lora: LoRA, style: str = "official", prefix: str = "") -> tuple[Row, ...]:
  """Rows for the adapter leaves that `lora.attach(Qwen25VL(config), lora)` adds.

  Args:
    config: sizes of the captioner.
    lora: uses `targets`.
    style: as in `table`.
    prefix: prefix of every name; `base_model.model.` in a PEFT adapter file.
  """
  rows = []
  for theirs, ours, _ in linears(config, style):
    if re.search(lora.targets, ours):
      rows.append(Row(f"{prefix}{theirs}.lora_A.weight", f"{ours}/lora_a", TRANSPOSE))
      rows.append(Row(f"{prefix}{theirs}.lora_B.weight", f"{ours}/lora_b", TRANSPOSE))
  return tuple(rows)


def adapter_targets(config: Qwen25VLConfig, names: Collection[str]) -> str | None:
  """The `LoRA.targets` that matches the adapters among tensors with "official" names; None without adapters.

  A stack is adapted if any of its layers is; `table.find_problems` then reports layers without an adapter.
  """
  found = [
    ours
    for theirs, ours, depth in linears(config)
    if any(f"{theirs.replace('{layer}', str(i))}.lora_A.weight" in names for i in range(depth))
  ]
  return f"^({'|'.join(found)})$" if found else None

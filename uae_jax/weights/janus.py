"""Weight tables for transformers' JanusForConditionalGeneration and for DeepSeek's files, to and from `models.janus`.

Source: transformers 5.23 modeling_janus.py; for the names in deepseek-ai/Janus-Pro-1B and 7B, its
convert_janus_weights_to_hf.py.
"""

from collections.abc import Collection, Iterator
import dataclasses
import re

from uae_jax.models.janus.model import JanusConfig
from uae_jax.models.janus.vq import VQConfig
from uae_jax.models.language import LanguageConfig
from uae_jax.models.vit import PatchTowerConfig
from uae_jax.weights.moves import TRANSPOSE, Reshape, Same, Then
from uae_jax.weights.table import Row, linear, norm
from uae_jax.weights.tensor_files import count_indices
from uae_jax.weights.vae import conv
from uae_jax.weights.vit import blocks, inside, patch_embed

TIED_HEAD = r"^(language_model\.)?lm_head\.weight$"
IGNORED = {
  r"\.position_ids$": "0, 1, 2, ...: stored by some versions of transformers",
  TIED_HEAD: "a copy of the embedding table, where a model with tied embeddings was saved with its head",
}
BLOCK = {
  "attention_norm": "layer_norm1",
  "query": "self_attn.q_proj",
  "key": "self_attn.k_proj",
  "value": "self_attn.v_proj",
  "out": "self_attn.projection_layer",
  "mlp_norm": "layer_norm2",
  "up": "mlp.fc1",
  "down": "mlp.fc2",
}
LANGUAGE_LINEARS = {
  "attention/query": "self_attn.q_proj",
  "attention/key": "self_attn.k_proj",
  "attention/value": "self_attn.v_proj",
  "attention/out": "self_attn.o_proj",
  "mlp/gate": "mlp.gate_proj",
  "mlp/up": "mlp.up_proj",
  "mlp/down": "mlp.down_proj",
}


# What DeepSeek's files have besides: also a pooling that Janus does not use.
IGNORED_IN_DEEPSEEK = {
  r"^vision_model\.vision_tower\.attn_pool\.": "the pooling of SigLIP, which Janus does not use",
  r"^gen_vision_model\.quantize\.codebook_used$": "a statistic of the tokenizer's training",
}
# Pattern in the names of transformers -> name in DeepSeek's files, applied one after the other.
DEEPSEEK = (
  (r"^model\.vision_model\.embeddings\.patch_embedding", "vision_model.vision_tower.patch_embed.proj"),
  (r"^model\.vision_model\.encoder\.layers", "vision_model.vision_tower.blocks"),
  (r"^model\.vision_model\.post_layernorm", "vision_model.vision_tower.norm"),
  (r"(blocks\.{layer})\.layer_norm", r"\1.norm"),
  (r"self_attn\.projection_layer", "attn.proj"),
  (r"^model\.vqmodel\.", "gen_vision_model."),
  (r"(encoder\.down|decoder\.up)\.(\d+)\.block", r"\1.\2.res"),
  (r"(encoder)\.down\.|(decoder)\.up\.", r"\1\2.conv_blocks."),
  (r"mid\.block_1", "mid.0"),
  (r"mid\.attn_1", "mid.1"),
  (r"mid\.block_2", "mid.2"),
  (r"^model\.generation_embeddings", "gen_embed"),
  (r"^model\.generation_aligner", "gen_aligner"),
  (r"^model\.aligner", "aligner"),
  (r"(aligner)\.fc1", r"\1.layers.0"),
  (r"^model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
  (r"^model\.generation_head", "gen_head"),
  (r"^model\.language_model", "language_model.model"),
  (r"^lm_head", "language_model.lm_head"),
)


def deepseek_table(config: JanusConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `Janus(config)` in DeepSeek's files."""
  tower, attention = "vision_model.vision_tower", "vision/encoder/layers/attention"
  width, patches = config.vision.width, config.vision.grid**2
  positions = Reshape((1, patches, width), (patches, width))
  rows = [Row(f"{tower}.pos_embed", "vision/positions", positions)]
  for theirs, ours, move in (("weight", "kernel", TRANSPOSE), ("bias", "bias", Same())):
    parts = tuple(f"{attention}/{name}/{ours}" for name in ("query", "key", "value"))
    rows.append(Row(f"{tower}.blocks.{{layer}}.attn.qkv.{theirs}", parts, move))
  known = {path for row in rows for path in row.paths}
  for row in table(config):
    if row.paths[0] not in known:
      rows.append(dataclasses.replace(row, theirs=_deepseek_name(row.theirs)))
  return tuple(rows)


def _deepseek_name(name: str) -> str:
  for pattern, replacement in DEEPSEEK:
    name = re.sub(pattern, replacement, name)
  # An activation stands between the linear layers of an aligner.
  return re.sub(r"aligner\.hidden_layers\.(\d+)", lambda found: f"aligner.layers.{2 * int(found[1]) + 2}", name)


def language_names(*, is_deepseek: bool) -> tuple[str, str]:
  """Names of the embedding table and of the head of the language model."""
  embedding, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
  return (_deepseek_name(embedding), _deepseek_name(head)) if is_deepseek else (embedding, head)


def size_problems(config: JanusConfig, tensors: Collection[str], *, is_deepseek: bool) -> list[str]:
  """Numbers of layers in a `config.json` that are not those of the tensors; all of them are built one by one."""

  def renamed(name: str) -> str:
    return _deepseek_name(name) if is_deepseek else name

  def linears(prefix: str) -> int:
    return sum(name.startswith(prefix) and name.endswith(".weight") for name in tensors)

  levels = renamed("model.vqmodel.encoder.down.")
  blocks = renamed("model.vqmodel.encoder.down.0.block.")
  # (the field of transformers, that of DeepSeek, what it says, how many there are)
  claims = (
    (
      "vision_config.num_hidden_layers",
      "vision_config.params.model_name",
      config.vision.depth,
      count_indices(tensors, renamed("model.vision_model.encoder.layers.")),
    ),
    (
      "text_config.num_hidden_layers",
      "language_config.num_hidden_layers",
      config.language.depth,
      count_indices(tensors, renamed("model.language_model.layers.")),
    ),
    ("vision_config.depth", "aligner_config.params.depth", config.vision_depth, linears(renamed("model.aligner."))),
    (
      "vq_config.num_hidden_layers",
      "gen_aligner_config.params.depth",
      config.image_depth,
      linears(renamed("model.generation_aligner.")),
    ),
    (
      "vq_config.channel_multiplier",
      "gen_vision_config.cls",
      len(config.vq.block_channels),
      count_indices(tensors, levels),
    ),
    ("vq_config.num_res_blocks", "gen_vision_config.cls", config.vq.layers_per_block, count_indices(tensors, blocks)),
  )
  return [
    f"{theirs if is_deepseek else name} says {claimed} layers, the tensors have {found}"
    for name, theirs, claimed, found in claims
    if claimed != found
  ]


def table(config: JanusConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `Janus(config)` in the files of transformers."""
  return (
    *inside("vision", vision_table(config.vision)),
    *aligner("model.aligner", "vision_aligner", config.vision_depth),
    *inside("language", language_table(config.language)),
    *inside("vq", vq_table(config.vq)),
    Row("model.generation_embeddings.weight", "image_embedding"),
    *aligner("model.generation_aligner", "image_aligner", config.image_depth),
    *linear("model.generation_head.proj_out", "image_head/hidden"),
    *linear("model.generation_head.vision_head", "image_head/out"),
  )


def vision_table(config: PatchTowerConfig) -> Iterator[Row]:
  """Rows for every parameter of `PatchTower(config)`."""
  tower = "model.vision_model"
  yield from patch_embed(f"{tower}.embeddings.patch_embedding", config.patch, config.width, bias=True)
  yield Row(f"{tower}.embeddings.position_embedding.weight", "positions")
  yield from blocks(config, f"{tower}.encoder.layers.{{layer}}", BLOCK)
  yield from norm(f"{tower}.post_layernorm", "norm_out", bias=True)


def aligner(theirs: str, ours: str, depth: int) -> Iterator[Row]:
  """Rows of an `Aligner`."""
  yield from linear(f"{theirs}.fc1", f"{ours}/layer0")
  for i in range(1, depth):
    yield from linear(f"{theirs}.hidden_layers.{i - 1}", f"{ours}/layer{i}")


def language_table(config: LanguageConfig) -> Iterator[Row]:
  """Rows for every parameter of `LanguageModel(config)`."""
  block = "model.language_model.layers.{layer}"
  yield Row("model.language_model.embed_tokens.weight", "embedding")
  for ours, theirs in LANGUAGE_LINEARS.items():
    yield from linear(f"{block}.{theirs}", f"layers/{ours}", bias=False)
  yield from norm(f"{block}.input_layernorm", "layers/attention_norm")
  yield from norm(f"{block}.post_attention_layernorm", "layers/mlp_norm")
  yield from norm("model.language_model.norm", "norm")
  if not config.ties_embeddings:
    yield Row("lm_head.weight", "head")


def vq_table(config: VQConfig) -> Iterator[Row]:
  """Rows for every parameter of `VQ(config)`."""
  vq, channels = "model.vqmodel", config.block_channels
  yield Row(f"{vq}.quantize.embedding.weight", "codebook")
  yield from conv(f"{vq}.quant_conv", "to_code")
  yield from conv(f"{vq}.post_quant_conv", "from_code")
  sides = (("encoder", channels, "down", "downsample"), ("decoder", channels[::-1], "up", "upsample"))
  for side, levels, name, sampler in sides:
    theirs = f"{vq}.{side}"
    yield from conv(f"{theirs}.conv_in", f"{side}/conv_in")
    yield from resnet(f"{theirs}.mid.block_1", f"{side}/middle/resnet1", has_shortcut=False)
    yield from attention(f"{theirs}.mid.attn_1", f"{side}/middle/attention", channels[-1])
    yield from resnet(f"{theirs}.mid.block_2", f"{side}/middle/resnet2", has_shortcut=False)
    yield from norm(f"{theirs}.norm_out", f"{side}/norm_out", bias=True)
    yield from conv(f"{theirs}.conv_out", f"{side}/conv_out")
    coarsest = len(levels) - 1 if side == "encoder" else 0
    for i, width in enumerate(levels):
      for j in range(config.layers_per_block + (side == "decoder")):
        has_shortcut = j == 0 and levels[max(i - 1, 0)] != width
        yield from resnet(f"{theirs}.{name}.{i}.block.{j}", f"{side}/level{i}/resnet{j}", has_shortcut)
        if i == coarsest:
          yield from attention(f"{theirs}.{name}.{i}.attn.{j}", f"{side}/level{i}/attention{j}", width)
      if i < len(levels) - 1:
        yield from conv(f"{theirs}.{name}.{i}.{sampler}.conv", f"{side}/level{i}/resample")


def resnet(theirs: str, ours: str, has_shortcut: bool) -> Iterator[Row]:
  """Rows of a `ResnetBlock`."""
  for i in (1, 2):
    yield from norm(f"{theirs}.norm{i}", f"{ours}/norm{i}", bias=True)
    yield from conv(f"{theirs}.conv{i}", f"{ours}/conv{i}")
  if has_shortcut:
    yield from conv(f"{theirs}.nin_shortcut", f"{ours}/shortcut")


def attention(theirs: str, ours: str, width: int) -> Iterator[Row]:
  """Rows of a `PixelAttention`, whose linear layers are 1 x 1 convolutions in torch."""
  yield from norm(f"{theirs}.norm", f"{ours}/norm", bias=True)
  kernel = Then((Reshape((width, width, 1, 1), (width, width)), TRANSPOSE))
  for their_name, our_name in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "out")):
    yield Row(f"{theirs}.{their_name}.weight", f"{ours}/{our_name}/kernel", kernel)
    yield Row(f"{theirs}.{their_name}.bias", f"{ours}/{our_name}/bias")

"""Janus equals transformers' JanusForConditionalGeneration: states, captions, image tokens, VQ, gradients, names."""

import copy
import types

from encoder_reference import TOLERANCE, abstract, assert_gradients_match, assert_round_trip, assert_same_layout
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import JanusConfig as TheirConfig
from transformers import JanusForConditionalGeneration

from uae_jax.models.janus.model import Janus, JanusConfig
from uae_jax.models.prompts import Prompts
from uae_jax.rollouts.captions import caption_hidden, caption_prefix, sample_captions, token_log_probs
from uae_jax.rollouts.image_tokens import ImageTokens
from uae_jax.weights import fields
from uae_jax.weights import janus as weights
from uae_jax.weights.table import load

BEGIN, END, PAD, IMAGE, BEGIN_IMAGE, END_IMAGE = 0, 1, 2, 3, 4, 5
SIDE, GRID, TOKENS = 12, 6, 36
TEXT = {
  "model_type": "llama",
  "vocab_size": 41,
  "hidden_size": 48,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-6,
  "bos_token_id": BEGIN,
  "eos_token_id": END,
  "pad_token_id": PAD,
}
VISION = {
  "image_size": SIDE,
  "patch_size": 2,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "mlp_ratio": 1.5,
  "projection_dim": 48,
  "num_image_tokens": TOKENS,
}
VQ = {
  "base_channels": 32,
  "channel_multiplier": [1, 2],
  "num_res_blocks": 1,
  "latent_channels": 12,
  "num_embeddings": 50,
  "embed_dim": 8,
  "projection_dim": 48,
  "image_token_embed_dim": 48,
}
SETTINGS = {
  "model_type": "janus",
  "text_config": TEXT,
  "vision_config": VISION,
  "vq_config": VQ,
  "image_token_id": IMAGE,
  "tie_word_embeddings": False,
}
CONFIG = JanusConfig.from_huggingface(SETTINGS)
PROMPT = np.array([BEGIN, 7, 9, BEGIN_IMAGE, *[IMAGE] * TOKENS, END_IMAGE, 30, 12], np.int32)
PUBLISHED = {
  "janus_pro_1b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5632},
  "janus_pro_7b": {"hidden_size": 4096, "num_hidden_layers": 30, "num_attention_heads": 32, "intermediate_size": 11008},
}


def make_reference(settings: dict) -> JanusForConditionalGeneration:
  sections = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
  return JanusForConditionalGeneration._from_config(TheirConfig(**sections), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def reference() -> JanusForConditionalGeneration:
  torch.set_num_threads(1)
  torch.manual_seed(0)
  model = make_reference(SETTINGS)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      is_norm = "norm" in name and name.endswith("weight")
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
      parameter.copy_(1 + 0.3 * noise if is_norm else noise / fan_in**0.5)
  model.generation_config.update(do_sample=False, pad_token_id=PAD, eos_token_id=END, bos_token_id=BEGIN)
  model.generation_config.generation_kwargs = {"boi_token_id": BEGIN_IMAGE}
  return model


@pytest.fixture(scope="module")
def tensors(reference) -> dict[str, np.ndarray]:
  return {name: value.detach().numpy() for name, value in reference.state_dict().items()}


@pytest.fixture(scope="module")
def ours(tensors):
  graphdef, shapes = abstract(lambda: Janus(CONFIG, rngs=nnx.Rngs(0)))
  return graphdef, shapes, load(tensors, weights.table(CONFIG), shapes, ignored=weights.IGNORED)


@pytest.fixture(scope="module")
def model(ours) -> Janus:
  graphdef, _, params = ours
  return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)


def pixels(images: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(images / np.float32(127.5) - 1).permute(0, 3, 1, 2)


def prompts() -> Prompts:
  none = np.zeros(0, np.int32)
  return Prompts(PROMPT, none, none, none, (GRID, GRID), PAD, (END,), (IMAGE,), TEXT["vocab_size"])


def test_logits_and_gradients(reference, ours, images):
  graphdef, _, params = ours
  tokens = np.stack([PROMPT, np.r_[PROMPT[:-1], 17]])

  def scalar(params):
    model = nnx.merge(graphdef, params)
    embeddings = model.embed_prompt(jnp.asarray(tokens), jnp.asarray(images))
    mask = jnp.ones(tokens.shape, bool)
    logits = model.logits(model.states(embeddings, model.text_positions(mask), mask))
    return jnp.sum(jnp.sin(logits)), logits

  (_, logits), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
  reference.zero_grad()
  theirs = reference(input_ids=torch.from_numpy(tokens).long(), pixel_values=pixels(images)).logits
  torch.sin(theirs).sum().backward()
  np.testing.assert_allclose(logits, theirs.detach(), atol=TOLERANCE * theirs.abs().max().item())
  names = (
    "model.vision_model.embeddings.patch_embedding.weight",
    "model.vision_model.encoder.layers.1.self_attn.projection_layer.weight",
    "model.aligner.hidden_layers.0.weight",
    "model.language_model.layers.0.self_attn.k_proj.weight",
    "model.language_model.embed_tokens.weight",
    "lm_head.weight",
  )
  assert_gradients_match(reference, grads, weights.table(CONFIG), names)


def test_greedy_captions(reference, model, images):
  found = jax.jit(greedy_captions)(model, jnp.asarray(images))
  tokens = torch.from_numpy(np.stack([PROMPT] * 2)).long()
  wanted = reference.generate(
    input_ids=tokens,
    attention_mask=torch.ones_like(tokens),
    pixel_values=pixels(images),
    max_new_tokens=12,
    suppress_tokens=[IMAGE],
  )[:, len(PROMPT) :]
  wanted = np.pad(wanted.numpy(), ((0, 0), (0, 12 - wanted.shape[1])), constant_values=PAD)
  np.testing.assert_array_equal(found.tokens[:, 0], wanted)


def greedy_captions(model: Janus, images: jax.Array):
  uae = types.SimpleNamespace(captioner=model)
  prefix = caption_prefix(uae, prompts(), images)
  return sample_captions(model, prompts(), prefix, jax.random.key(0), num_rollouts=1, max_tokens=12, temperature=0.0)


TEXTS = np.array([[BEGIN, 7, 9, 20, BEGIN_IMAGE], [BEGIN, 8, BEGIN_IMAGE, PAD, PAD]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


def image_prefix(model: Janus, guidance: float):
  policy = ImageTokens(model, guidance)
  return policy, policy.prefix(model.embed(jnp.asarray(TEXTS)), jnp.asarray(MASK), model.embed(jnp.array([[PAD]])))


def sample_images(model: Janus, guidance: float, temperature: float, num_rollouts: int = 1):
  policy, prefix = image_prefix(model, guidance)
  return sample_captions(
    policy,
    policy.prompts,
    prefix,
    jax.random.key(1),
    num_rollouts=num_rollouts,
    max_tokens=TOKENS,
    temperature=temperature,
  )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_greedy_image_tokens(reference, model, guidance):
  found = jax.jit(sample_images, static_argnums=(1, 2))(model, guidance, 0.0)
  # transformers pads on the left.
  left = np.array([TEXTS[0], np.roll(TEXTS[1], 2)])
  wanted = reference.generate(
    inputs=torch.from_numpy(left).long(),
    attention_mask=torch.from_numpy(np.array([MASK[0], np.roll(MASK[1], 2)])).long(),
    generation_mode="image",
    # It fails at exactly 1, where it runs two branches and keeps both.
    guidance_scale=max(guidance, 1 + 1e-6),
  )
  np.testing.assert_array_equal(found.tokens[:, 0], wanted)
  assert found.mask.all() and not found.is_closed.any()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_replay_gives_the_log_probabilities_of_the_rollout(model, guidance):
  found = jax.jit(sample_images, static_argnums=(1, 2, 3))(model, guidance, 1.0, 3)
  assert len({tuple(row) for row in np.asarray(found.tokens).reshape(-1, TOKENS)}) == 6

  def replay(model, tokens):
    policy, prefix = image_prefix(model, guidance)
    hidden, _ = caption_hidden(policy, prefix, tokens)
    return token_log_probs(policy, hidden, tokens)

  log_probs, entropy = jax.jit(replay)(model, found.tokens)
  np.testing.assert_allclose(log_probs, found.log_probs, atol=2e-5)
  assert (entropy > 0).all()


def test_guidance_needs_a_negative_prompt(model):
  with pytest.raises(ValueError, match="guidance = 5.0 needs negative prompts"):
    ImageTokens(model, 5.0).prefix(model.embed(jnp.asarray(TEXTS)), jnp.asarray(MASK))


def test_the_tokenizer_both_ways(reference, model, images):
  theirs = reference.model.vqmodel
  with torch.no_grad():
    wanted = theirs.encode(pixels(images), return_dict=True)
    tokens = wanted.image_tokens.reshape(2, -1)
    decoded = theirs.decode(tokens).permute(0, 2, 3, 1)
    latents = theirs.quant_conv(theirs.encoder(pixels(images))).permute(0, 2, 3, 1)
  signed = jnp.asarray(pixels(images).permute(0, 2, 3, 1).numpy())
  np.testing.assert_allclose(jax.jit(model.vq.latents)(signed), latents, atol=TOLERANCE * latents.abs().max().item())
  np.testing.assert_array_equal(jax.jit(model.vq.encode)(signed), tokens)
  found = jax.jit(lambda tokens: model.vq.decode(tokens, (GRID, GRID)))(jnp.asarray(tokens.numpy(), jnp.int32))
  np.testing.assert_allclose(found, decoded, atol=TOLERANCE * decoded.abs().max().item())
  with pytest.raises(ValueError, match="36 image tokens do not fill a grid of 5 x 6"):
    model.vq.decode(jnp.zeros((1, 36), jnp.int32), (5, 6))


def test_weights_go_both_ways(tensors, ours):
  assert_round_trip(tensors, weights.table(CONFIG), ours[1])


def deepseek_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors under the names of DeepSeek's files, written out for this small model."""
  found = {}
  for name, value in tensors.items():
    if "vision_model.encoder.layers" in name and ".self_attn." in name and "projection_layer" not in name:
      continue
    for theirs, original in (
      ("model.vision_model.embeddings.position_embedding.weight", "vision_model.vision_tower.pos_embed"),
      ("model.vision_model.embeddings.patch_embedding", "vision_model.vision_tower.patch_embed.proj"),
      ("model.vision_model.post_layernorm", "vision_model.vision_tower.norm"),
      ("model.vision_model.encoder.layers", "vision_model.vision_tower.blocks"),
      ("self_attn.projection_layer", "attn.proj"),
      ("layer_norm", "norm"),
      ("model.vqmodel.encoder.down.0.block", "gen_vision_model.encoder.conv_blocks.0.res"),
      ("model.vqmodel.encoder.down.1.block", "gen_vision_model.encoder.conv_blocks.1.res"),
      ("model.vqmodel.encoder.down", "gen_vision_model.encoder.conv_blocks"),
      ("model.vqmodel.decoder.up.0.block", "gen_vision_model.decoder.conv_blocks.0.res"),
      ("model.vqmodel.decoder.up.1.block", "gen_vision_model.decoder.conv_blocks.1.res"),
      ("model.vqmodel.decoder.up", "gen_vision_model.decoder.conv_blocks"),
      ("model.vqmodel", "gen_vision_model"),
      ("mid.block_1", "mid.0"),
      ("mid.attn_1", "mid.1"),
      ("mid.block_2", "mid.2"),
      ("model.generation_aligner.fc1", "gen_aligner.layers.0"),
      ("model.generation_aligner.hidden_layers.0", "gen_aligner.layers.2"),
      ("model.aligner.fc1", "aligner.layers.0"),
      ("model.aligner.hidden_layers.0", "aligner.layers.2"),
      ("model.generation_embeddings", "gen_embed"),
      ("model.generation_head.proj_out", "gen_head.output_mlp_projector"),
      ("model.generation_head", "gen_head"),
      ("model.language_model", "language_model.model"),
      ("lm_head", "language_model.lm_head"),
    ):
      if not (theirs == "layer_norm" and "vision_tower" not in name):
        name = name.replace(theirs, original)
    found[name] = value[None] if name.endswith("pos_embed") else value
  for layer in range(VISION["num_hidden_layers"]):
    for leaf in ("weight", "bias"):
      prefix = f"model.vision_model.encoder.layers.{layer}.self_attn"
      parts = [tensors[f"{prefix}.{name}_proj.{leaf}"] for name in "qkv"]
      found[f"vision_model.vision_tower.blocks.{layer}.attn.qkv.{leaf}"] = np.concatenate(parts)
  return found


def test_deepseek_files(tensors, ours):
  original = deepseek_tensors(tensors)
  assert_round_trip(original, weights.deepseek_table(CONFIG), ours[1])
  surplus = {
    "vision_model.vision_tower.attn_pool.q.weight": np.zeros(3, np.float32),
    "gen_vision_model.quantize.codebook_used": np.zeros(3, np.float32),
  }
  found = load(original | surplus, weights.deepseek_table(CONFIG), ours[1], ignored=weights.IGNORED_IN_DEEPSEEK)
  jax.tree.map(np.testing.assert_array_equal, found, ours[2])


def test_deepseek_config():
  # Source: config.json of deepseek-ai/Janus-Pro-7B, without what it does not need.
  config = {
    "model_type": "multi_modality",
    "vision_config": {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384"}},
    "aligner_config": {"params": {"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_vision_config": {"params": {"image_token_size": 16384, "n_embed": 8}},
    "gen_aligner_config": {"params": {"depth": 2, "input_dim": 8, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_head_config": {"params": {"image_token_embed": 4096, "image_token_size": 16384, "n_embed": 4096}},
    "language_config": PUBLISHED["janus_pro_7b"] | {"model_type": "llama", "vocab_size": 102400},
  }
  assert JanusConfig.from_deepseek(config) == JanusConfig.janus_pro_7b()
  for change, message in (
    ({"model_type": "janus"}, "model_type is 'janus', expected 'multi_modality'"),
    ({"vision_config": {"params": {"model_name": "sam"}}}, "model_name is 'sam'"),
    ({"gen_head_config": {"params": {"image_token_embed": 8, "n_embed": 4096}}}, "image_token_embed is 8"),
    ({"aligner_config": {"params": {"n_embed": 8}}}, "projection_dim is 8"),
  ):
    with pytest.raises(ValueError, match=message):
      JanusConfig.from_deepseek(config | change)


def test_fields_of_deepseek_are_checked():
  def part(cls, **params):
    return {"cls": cls, "params": params}

  aligner = dict(depth=2, input_dim=1024, n_embed=4096, projector_type="mlp_gelu")
  config = {
    "model_type": "multi_modality",
    "vision_config": part(
      "CLIPVisionTower",
      image_size=384,
      model_name="siglip_large_patch16_384",
      select_feature="same",
      select_layer=-1,
    ),
    "aligner_config": part("MlpProjector", **aligner),
    "gen_vision_config": part("VQ-16", image_token_size=16384, n_embed=8),
    "gen_aligner_config": part("MlpProjector", **aligner | {"input_dim": 8}),
    "gen_head_config": part("vision_head", image_token_embed=4096, image_token_size=16384, n_embed=4096),
    "language_config": {"model_type": "llama", "vocab_size": 102400, "torch_dtype": "bfloat16"},
    "torch_dtype": "bfloat16",
  }
  assert fields.check_janus(config) == fields.Findings([], [])
  for section, params, problem in (
    ("vision_config", {"select_layer": -2}, "vision_config.params.select_layer is -2, only -1 is supported"),
    ("vision_config", {"pixel_mean": [0.5] * 3}, "vision_config.params.pixel_mean is [0.5, 0.5, 0.5], only None"),
    ("gen_aligner_config", {"projector_type": "linear"}, "gen_aligner_config.params.projector_type is 'linear'"),
    ("gen_head_config", {"n_embed": "4096"}, "gen_head_config.params.n_embed is '4096', expected an integer"),
  ):
    changed = copy.deepcopy(config)
    changed[section]["params"] |= params
    (found,) = fields.check_janus(changed).problems
    assert found.startswith(problem)
  for changed, problem in (
    ({"gen_vision_config": {"cls": "VQ-8", "params": {}}}, "gen_vision_config.cls is 'VQ-8', only 'VQ-16'"),
    ({"gen_vision_config": {"cls": "VQ-16", "params": [1]}}, "gen_vision_config.params is no object"),
    ({"gen_head_config": [1]}, "gen_head_config is no object"),
  ):
    (found,) = fields.check_janus(config | changed).problems
    assert found.startswith(problem)
  changed = copy.deepcopy(config)
  changed["vision_config"]["params"]["window"] = 7
  assert fields.check_janus(changed).unknown == ["vision_config.params.window"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  width = PUBLISHED[name]["hidden_size"]
  settings = {
    "text_config": {"model_type": "llama", "vocab_size": 102400} | PUBLISHED[name],
    "vision_config": {"projection_dim": width},
    "vq_config": {"projection_dim": width, "image_token_embed_dim": width},
    "tie_word_embeddings": False,
  }
  config = getattr(JanusConfig, name)()
  assert JanusConfig.from_huggingface({"model_type": "janus"} | settings) == config
  with torch.device("meta"):
    reference = JanusForConditionalGeneration(TheirConfig(**settings))
  _, shapes = abstract(lambda: Janus(config, rngs=nnx.Rngs(0)))
  assert_same_layout(reference.state_dict(), weights.table(config), shapes)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl', expected 'janus'"),
    ({"vision_config": VISION | {"use_qk_norm": True}}, "use_qk_norm is true"),
    ({"vision_config": VISION | {"num_image_tokens": 64}}, "num_image_tokens is 64, images have 36 patches"),
    ({"vision_config": VISION | {"projection_dim": 64}}, "vision_config.projection_dim is 64"),
    ({"vq_config": VQ | {"image_token_embed_dim": 64}}, "vq_config.image_token_embed_dim is 64"),
    ({"vq_config": VQ | {"double_latent": True}}, "vq_config.double_latent is True"),
    ({"vq_config": VQ | {"base_channels": 24}}, "do not divide into 32 groups"),
    ({"text_config": TEXT | {"attention_bias": True}}, "text_config.attention_bias is True"),
    ({"text_config": TEXT | {"rope_scaling": {"rope_type": "yarn"}}}, "rope type 'yarn'"),
    ({"image_token_id": 41}, "image_token_id 41 is not in a vocabulary of 41"),
  ],
)
def test_other_architectures_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    JanusConfig.from_huggingface(SETTINGS | change)

"""Qwen2.5-VL equals transformers' Qwen2_5_VLForConditionalGeneration: outputs, gradients, captions, names, counts."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from uae_jax import sharding, trees
from uae_jax.models.language import LanguageConfig
from uae_jax.models.positions import mrope_positions, next_position, text_positions
from uae_jax.models.qwen25_vl.model import Qwen25VL, Qwen25VLConfig, inputs_spec
from uae_jax.models.qwen25_vl.vision import VisionConfig, normalize, patchify
from uae_jax.weights import qwen25_vl as weights
from uae_jax.weights.table import WeightError, dump, load, specs

IMAGE, START, END = 5, 6, 7
VISION = {
  "depth": 4,
  "hidden_size": 32,
  "intermediate_size": 20,
  "num_heads": 2,
  "out_hidden_size": 48,
  "patch_size": 4,
  "spatial_merge_size": 2,
  "window_size": 16,
  "fullatt_block_indexes": [1, 3],
  "temporal_patch_size": 2,
}
TEXT = {
  "vocab_size": 41,
  "hidden_size": 48,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e4,
  "rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]},
  "tie_word_embeddings": True,
  "image_token_id": IMAGE,
  "video_token_id": 8,
  "vision_start_token_id": START,
  "vision_end_token_id": END,
  "bos_token_id": 0,
  "eos_token_id": 40,
}
KINDS = {
  "tied": (TEXT, VISION),
  "untied": (
    TEXT | {"tie_word_embeddings": False, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    VISION | {"patch_size": 6, "spatial_merge_size": 3, "window_size": 54, "fullatt_block_indexes": [0, 1], "depth": 3},
  ),
}
PUBLISHED = {
  "qwen25_vl_3b": (2048, 11008, 36, 16, 2, 151936, True, 3_754_622_976),
  "qwen25_vl_7b": (3584, 18944, 28, 28, 4, 152064, False, 8_292_166_656),
}


@dataclasses.dataclass
class Pair:
  """A random torch model and our model with the same weights."""

  reference: Qwen2_5_VLForConditionalGeneration
  settings: dict
  tensors: dict
  config: Qwen25VLConfig
  graphdef: nnx.GraphDef
  shapes: dict
  params: dict

  def model(self, params=None) -> Qwen25VL:
    return nnx.merge(self.graphdef, self.params if params is None else params)


@dataclasses.dataclass
class Prompts:
  """Right-padded rows with one image each."""

  tokens: np.ndarray
  mask: np.ndarray
  positions: np.ndarray
  patches: np.ndarray
  grid: tuple[int, int]


def build(config: Qwen25VLConfig, mesh=None):
  return sharding.abstract_model(lambda: Qwen25VL(config, rngs=nnx.Rngs(0)), mesh or sharding.make_mesh(8))


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  text, vision = KINDS[request.param]
  settings = text | {"vision_config": vision}
  reference = make_reference(settings)
  with torch.no_grad():
    for name, parameter in reference.named_parameters():
      noise = torch.randn_like(parameter)
      is_norm = "norm" in name or "ln_q" in name
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
      parameter.copy_(1 + 0.3 * noise if is_norm else noise / fan_in**0.5)
  tensors = state(reference)
  config = Qwen25VLConfig.from_huggingface(settings)
  graphdef, shapes = build(config)
  return Pair(
    reference,
    settings,
    tensors,
    config,
    graphdef,
    shapes,
    load(tensors, weights.table(config, "v5"), shapes, ignored=weights.IGNORED),
  )


def make_reference(settings) -> Qwen2_5_VLForConditionalGeneration:
  # The library modifies its argument dicts.
  config = Qwen2_5_VLConfig(**settings | {key: dict(settings[key]) for key in ("vision_config", "rope_scaling")})
  return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def state(reference) -> dict:
  """Tensors as in a checkpoint file: the head is stored only if it is not tied to the embedding."""
  tied = reference.config.tie_word_embeddings
  items = reference.state_dict().items()
  return {name: value.detach().numpy() for name, value in items if not (tied and name == "lm_head.weight")}


def example(pair, cells=(5, 3), lengths=((4, 6), (2, 3)), seed=1) -> Prompts:
  """An image of `cells` between (before, after) random words; the rows are padded together."""
  config, rng = pair.config, np.random.default_rng(seed)

  def word(n):
    return rng.integers(9, config.language.vocab_size, n).tolist()

  rows = [word(a) + [START] + [IMAGE] * (cells[0] * cells[1]) + [END] + word(b) for a, b in lengths]
  length = max(map(len, rows))
  tokens = np.asarray([row + [0] * (length - len(row)) for row in rows], np.int32)
  mask = np.asarray([[True] * len(row) + [False] * (length - len(row)) for row in rows])
  grid = tuple(side * config.vision.spatial_merge for side in cells)
  size = [side * config.vision.patch_size for side in grid]
  images = rng.integers(0, 256, (len(rows), *size, 3), np.uint8)
  patches = np.asarray(patchify(normalize(images, config.vision), config.vision))
  return Prompts(tokens, mask, mrope_positions(tokens, mask, IMAGE, cells), patches, grid)


def theirs(reference, prompts: Prompts, patches=None, **options):
  """Runs the torch model on the same prompts with the same positions."""
  flat = torch.tensor(prompts.patches) if patches is None else patches
  return reference(
    input_ids=torch.tensor(prompts.tokens).long(),
    attention_mask=torch.tensor(prompts.mask).long(),
    position_ids=torch.tensor(prompts.positions).long(),
    pixel_values=flat.reshape(-1, flat.shape[-1]),
    image_grid_thw=torch.tensor([[1, *prompts.grid]] * len(prompts.tokens)),
    use_cache=False,
    **options,
  )


def logits(model: Qwen25VL, prompts: Prompts, patches=None, dtype=jnp.float32):
  embeddings = model.embed_prompt(prompts.tokens, prompts.patches if patches is None else patches, prompts.grid)
  return model.language.logits(model.language(embeddings.astype(dtype), prompts.positions, prompts.mask))


@pytest.mark.parametrize("cells", [(4, 6), (5, 3), (1, 7), (2, 1), (1, 1)])
def test_image_tokens(pair, cells):
  """Grids of complete and partial windows, and smaller than a window; a faint image exposes a wrong epsilon."""
  prompts = example(pair, cells)
  tower = jax.jit(lambda params, patches: pair.model(params).vision(patches, prompts.grid))
  for scale in (np.float32(1), np.float32(0.01)):
    patches = scale * prompts.patches
    with torch.no_grad():
      flat = torch.tensor(patches).reshape(-1, patches.shape[-1])
      want = pair.reference.model.visual(flat, grid_thw=torch.tensor([[1, *prompts.grid]] * 2)).pooler_output
    out = tower(pair.params, patches)
    assert out.shape == (2, cells[0] * cells[1], 48)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("cells", [(4, 2), (3, 5)])
def test_logits(pair, cells):
  """Compares every slot: queries at padding attend to the tokens of their row, as in transformers."""
  prompts = example(pair, cells)
  with torch.no_grad():
    want = theirs(pair.reference, prompts).logits
  out = jax.jit(lambda params: logits(pair.model(params), prompts))(pair.params)
  assert out.dtype == jnp.float32 and want.std() > 0.3
  np.testing.assert_allclose(out, want, atol=1e-4)


def test_text_alone(pair):
  rng = np.random.default_rng(3)
  tokens, mask = rng.integers(9, 41, (2, 9)), np.arange(9) < np.array([[9], [4]])
  positions = text_positions(mask)
  with torch.no_grad():
    want = pair.reference(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask).long(),
      position_ids=torch.tensor(positions).long(),
      output_hidden_states=True,
    )
  language = pair.model().language
  hidden = language(language.embed(tokens), positions, mask)
  np.testing.assert_allclose(hidden, want.hidden_states[-1], atol=1e-4)
  np.testing.assert_allclose(language.logits(hidden), want.logits, atol=1e-4)


def test_positions_are_those_of_transformers(pair):
  prompts = example(pair, (3, 5))
  want, _ = pair.reference.model.get_rope_index(
    torch.tensor(prompts.tokens).long(),
    mm_token_type_ids=torch.tensor(prompts.tokens == IMAGE).int(),
    image_grid_thw=torch.tensor([[1, *prompts.grid]] * 2),
    attention_mask=torch.tensor(prompts.mask).long(),
  )
  # Positions of padding are 0 in transformers 5 and 1 in the official 4.50.
  want = np.where(prompts.mask, want.numpy(), 1)
  np.testing.assert_array_equal(prompts.positions, want)
  traced = jax.jit(lambda tokens, mask: mrope_positions(tokens, mask, IMAGE, (3, 5)))(prompts.tokens, prompts.mask)
  np.testing.assert_array_equal(traced, want)
  # 4 words, the start token, an image of 3 x 5 cells that advances positions by 5, the end token, 6 words.
  assert next_position(prompts.positions, prompts.mask).tolist() == [4 + 1 + 5 + 1 + 6, 2 + 1 + 5 + 1 + 3]


def test_positions_of_several_and_unequal_images():
  tokens = np.array([[9, IMAGE, IMAGE, 9, IMAGE, IMAGE, 9], [IMAGE, IMAGE, IMAGE, IMAGE, 9, 9, 9]], np.int32)
  mask = np.array([[True] * 7, [True] * 6 + [False]])
  out = mrope_positions(tokens, mask, IMAGE, (np.array([1, 2]), np.array([2, 2])))
  assert out[:, 0].tolist() == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 5, 6]]
  assert out[:, 1].tolist() == [[0, 0, 0, 0, 2, 3, 1], [0, 0, 1, 1, 2, 3, 1], [0, 1, 0, 1, 2, 3, 1]]
  with pytest.raises(ValueError, match="not a multiple"):
    mrope_positions(tokens, mask, IMAGE, (3, 1))


def test_gradients(pair):
  prompts = example(pair)
  target = np.random.default_rng(2).normal(size=(*prompts.tokens.shape, 41)).astype(np.float32)
  patches = torch.tensor(prompts.patches, requires_grad=True)
  pair.reference.zero_grad()
  torch.sum(theirs(pair.reference, prompts, patches).logits * torch.tensor(target)).backward()

  def loss(params, patches):
    return jnp.sum(logits(pair.model(params), prompts, patches) * target)

  grads, image_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(pair.params, prompts.patches)
  np.testing.assert_allclose(image_grad, patches.grad, atol=2e-5 * float(patches.grad.abs().max()))
  found = dump(jax.tree.map(np.asarray, grads), weights.table(pair.config, "v5"))
  for name, parameter in pair.reference.named_parameters():
    scale = max(1e-2, float(parameter.grad.abs().max()))
    np.testing.assert_allclose(found[name], parameter.grad, atol=5e-5 * scale, err_msg=name)


def test_greedy_captions(pair):
  """Decoding on the prefix cache, with rows of unequal length in one batch, gives the tokens of `generate`."""
  prompts, count = example(pair, (2, 3)), 12
  language = pair.model().language
  embeddings = pair.model().embed_prompt(prompts.tokens, prompts.patches, prompts.grid)
  hidden, prefix = language.prefill(embeddings, prompts.positions, prompts.mask)
  last = hidden[np.arange(2), prompts.mask.sum(axis=1) - 1]
  first = next_position(prompts.positions, prompts.mask)

  def step(carry, t):
    hidden, suffix = carry
    token = jnp.argmax(language.logits(hidden), axis=-1)
    positions = jnp.broadcast_to(first[:, None, None] + t, (3, 2, 1, 1))
    hidden, suffix = language.extend(language.embed(token)[:, None, None], positions, prefix, suffix, t)
    return (hidden[:, 0, 0], suffix), token

  _, tokens = jax.lax.scan(step, (last, language.init_suffix(2, 1, count)), jnp.arange(count))
  for row in range(2):
    length = int(prompts.mask[row].sum())
    ids = torch.tensor(prompts.tokens[row : row + 1, :length]).long()
    with torch.no_grad():
      want = pair.reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.tensor(prompts.patches[row]),
        image_grid_thw=torch.tensor([[1, *prompts.grid]]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
      )
    assert tokens[:, row].tolist() == want[0, length:].tolist()


@pytest.mark.parametrize("pair", ["tied"], indirect=True)
def test_scan_unroll_and_remat_are_equal(pair):
  prompts = example(pair)

  def run(change):
    config = dataclasses.replace(
      pair.config,
      vision=dataclasses.replace(pair.config.vision, **change),
      language=dataclasses.replace(pair.config.language, **change),
    )
    graphdef, _ = build(config)
    return jax.jit(jax.value_and_grad(lambda params: jnp.mean(logits(nnx.merge(graphdef, params), prompts) ** 2)))

  value, grads = run({})(pair.params)
  for change in ({"remat": "full"}, {"remat": "dots", "unroll": True}):
    other_value, other_grads = run(change)(pair.params)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for (path, want), (_, got) in zip(trees.items(grads), trees.items(other_grads), strict=True):
      np.testing.assert_allclose(got, want, atol=2e-5 * max(1e-2, float(jnp.abs(want).max())), err_msg=path)


def test_unrolled_layers_are_straight_code(pair):
  """The choice between window and full attention is made at compile time, not in every layer."""
  prompts = example(pair)
  config = dataclasses.replace(pair.config.vision, unroll=True)
  graphdef, _ = build(dataclasses.replace(pair.config, vision=config))

  def tower(params):
    return nnx.merge(graphdef, params).vision(prompts.patches, prompts.grid)

  program = jax.jit(tower).lower(pair.params).compile().as_text()
  assert " conditional(" not in program and " while(" not in program


def test_bfloat16_rounds_no_more_than_torch(pair):
  prompts = example(pair, lengths=((4, 6), (2, 3), (7, 1), (3, 9)))
  exact = np.asarray(logits(pair.model(), prompts))
  half = trees.cast(jax.tree.map(jnp.asarray, pair.params), jnp.bfloat16)
  out = jax.jit(lambda params: logits(pair.model(params), prompts, dtype=jnp.bfloat16))(half)
  reference = make_reference(pair.settings)
  reference.load_state_dict({name: torch.tensor(value) for name, value in pair.tensors.items()}, strict=False)
  with torch.no_grad():
    want = theirs(reference.to(torch.bfloat16), prompts).logits.float()

  def error(x):
    return float(np.sqrt(np.mean((np.asarray(x, np.float32) - exact)[prompts.mask] ** 2)))

  assert 0 < error(out) <= 1.5 * error(want)


@pytest.mark.parametrize("style", ["official", "v5"])
def test_round_trip_is_exact(pair, style):
  table = weights.table(pair.config, style)
  back = dump(pair.params, table)

  def old(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

  renamed = {old(name) for name in pair.tensors}
  assert back.keys() == (pair.tensors.keys() if style == "v5" else renamed)
  again = load(back, table, pair.shapes)
  assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (again, pair.params)), strict=True))
  if style == "v5":
    assert all(np.array_equal(back[name], pair.tensors[name]) for name in back)


def test_a_missing_and_an_unknown_tensor_raise(pair):
  table = weights.table(pair.config, "v5")
  name = "model.visual.blocks.1.attn.qkv.bias"
  with pytest.raises(WeightError, match=f"missing {name}"):
    load({k: v for k, v in pair.tensors.items() if k != name}, table, pair.shapes)
  extra = {"model.language_model.layers.9.mlp.up_proj.weight": np.zeros(2)}
  with pytest.raises(WeightError, match="unexpected model.language_model.layers.9"):
    load(pair.tensors | extra, table, pair.shapes, ignored=weights.IGNORED)
  known = {"projector.0.weight": np.zeros(2)}
  load(pair.tensors | known, table, pair.shapes, ignored=weights.IGNORED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size(name):
  """The tensors equal those of the published sizes in names, counts and shapes, on a mesh that uses every axis."""
  width, mlp, depth, heads, kv_heads, vocabulary, tied, parameters = PUBLISHED[name]
  vision = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": width,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
  }
  settings = {
    "vocab_size": vocabulary,
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": depth,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": tied,
    "image_token_id": 151655,
    "vision_config": vision,
  }
  config = getattr(Qwen25VLConfig, name)()
  assert config == Qwen25VLConfig.from_huggingface(settings)
  with torch.device("meta"):
    reference = make_reference(settings)
  # The nested format of transformers 5 describes the same model.
  assert config == Qwen25VLConfig.from_huggingface(reference.config.to_dict())
  _, shapes = build(config, sharding.make_mesh(2, 2, 2))
  assert trees.count(shapes) == parameters == sum(x.numel() for x in reference.parameters())
  want = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
  if tied:
    want.pop("lm_head.weight")
  assert {name: spec.shape for name, spec in specs(weights.table(config, "v5"), shapes).items()} == want
  for path, leaf in trees.items(shapes):
    assert leaf.sharding.shard_shape(leaf.shape), path


def test_inputs_spec_is_what_the_model_takes(pair):
  spec = inputs_spec(pair.config, batch=2, tokens=30, grid=(12, 6), dtype=jnp.bfloat16)
  out = jax.eval_shape(lambda params, spec: pair.model(params).embed_prompt(**spec, grid=(12, 6)), pair.params, spec)
  assert out.shape == (2, 30, 48)


def test_what_does_not_fit_is_refused(pair):
  model, prompts = pair.model(), example(pair)
  with pytest.raises(ValueError, match="not those of a grid"):
    model.vision(prompts.patches[:, 1:], prompts.grid)
  with pytest.raises(ValueError, match="do not divide into cells"):
    patchify(jnp.zeros((1, 20, 33, 3)), pair.config.vision)
  with pytest.raises(ValueError, match="sliding"):
    Qwen25VLConfig.from_huggingface(pair.settings | {"use_sliding_window": True})
  with pytest.raises(ValueError, match="rope type 'yarn'"):
    Qwen25VLConfig.from_huggingface(pair.settings | {"rope_scaling": {"type": "yarn"}})
  with pytest.raises(ValueError, match="mrope_sections"):
    dataclasses.replace(LanguageConfig.qwen25_3b(), mrope_sections=(16, 24, 25))
  with pytest.raises(ValueError, match="out_width"):
    dataclasses.replace(pair.config, vision=dataclasses.replace(pair.config.vision, out_width=64))
  with pytest.raises(ValueError, match="window_px"):
    VisionConfig(depth=1, width=8, num_heads=1, mlp_width=8, out_width=8, window_px=8)

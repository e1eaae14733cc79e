"""Loss, metrics and gradient of a supervised stage do not depend on the number of microbatches, nor on the devices."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.properties.rl_world import built, mesh, params
from uae_jax import sharding
from uae_jax.options import CaptionerOptions, ColdStartOptions, ContrastiveOptions, PretrainOptions, VAEOptions
from uae_jax.rollouts import captions
from uae_jax.small_world import render, scenes
from uae_jax.training.stages import captioner, cold_start, contrastive, pretrain, vae
from uae_jax.training.state import create
from uae_jax.training.supervised import make_step

ROWS, TOKENS = 16, 12
SAMPLED = dict(captions="sampled", conditioning="text", guidance=1.0, flow_weight=1.0)
# stage -> (loss, the parameters that are differentiated here).
STAGES = {
  "vae": (lambda networks: vae.make_loss(networks, VAEOptions()), "vae/decoder/conv_out"),
  "captioner": (lambda networks: captioner.make_loss(networks, CaptionerOptions()), "captioner/.*mlp/down"),
  "pretrain": (lambda networks: pretrain.make_loss(networks, PretrainOptions(context_dropout=0.5)), "connector"),
  "cold_start": (
    lambda networks: cold_start.make_loss(networks, ColdStartOptions(**SAMPLED, sampler_steps=1, gradient_steps=1)),
    "connector",
  ),
}


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
  """Lowers compiler effort: each program runs once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


# By default every stage but the slowest on one device, and the one with captions of different length on eight.
DEFAULT = (("vae", False), ("captioner", False), ("pretrain", False), ("captioner", True))
CASES = [
  pytest.param(
    name,
    on_mesh,
    id=f"{name}-{8 if on_mesh else 1}",
    marks=() if (name, on_mesh) in DEFAULT else pytest.mark.slow,
  )
  for name in STAGES
  for on_mesh in (False, True)
]


@functools.cache
def batch() -> dict:
  """Captions of very different length, of which some are not closed."""
  prompts, random = built().networks.prompts, np.random.default_rng(0)
  tokens = random.integers(10, built().processor.vocab_size, (ROWS, TOKENS)).astype(np.int32)
  for row, length in enumerate(random.integers(1, TOKENS + 3, ROWS)):
    if length < TOKENS:
      tokens[row, length], tokens[row, length + 1 :] = prompts.end[0], prompts.pad
  return {"image": render.render_batch(scenes.scenes(np.arange(ROWS))), "tokens": tokens}


@functools.cache
def trained(name: str, num_microbatches: int, *, on_mesh: bool = False):
  """(metrics, gradients) of one step of gradient descent."""
  make_loss, pattern = STAGES[name]
  optimizer = optax.sgd(1.0)
  step = jax.jit(make_step(make_loss(built().networks), optimizer, num_microbatches=num_microbatches))
  tree, rows = params(), batch()
  if on_mesh:
    tree, rows = jax.device_put(tree, built().shardings), jax.device_put(rows, sharding.batch_sharding(mesh()))
  with jax.set_mesh(mesh() if on_mesh else sharding.make_mesh(devices=jax.devices()[:1])):
    state = create(
      tree,
      lambda path: path.startswith(pattern.split("/.*")[0]) and pattern.split("/.*")[-1] in path,
      optimizer,
      jax.random.key(1),
      has_ema=False,
    )
    after, metrics = step(state, rows)
    grads = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.trainable, after.trainable)
  return {key: float(value) for key, value in metrics.items()}, grads


@pytest.mark.parametrize(("name", "on_mesh"), CASES)
def test_pieces_of_a_batch_are_the_batch(name, on_mesh):
  whole, gradient = trained(name, 1)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
  assert scale > 1e-4
  metrics, grads = trained(name, 2, on_mesh=on_mesh)
  for key, value in whole.items():
    assert metrics[key] == pytest.approx(value, rel=2e-4, abs=1e-6), key
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), grads, gradient)


def test_the_loss_of_the_captioner_is_the_mean_over_all_tokens():
  """By hand, from the log-probabilities of each token; the mean of the means of two pieces is another number."""
  options = CaptionerOptions(pixel_noise_std_255=0.0, text_only_weight=0.0)
  networks, rows = built().networks, batch()
  keys = jax.random.split(jax.random.key(0), ROWS)
  loss, metrics = jax.jit(captioner.make_loss(networks, options))(params(), rows, keys)
  log_probs = jax.jit(
    lambda params: captions.caption_log_probs(
      networks.uae(params), networks.prompts, rows["image"], rows["tokens"][:, None], has_whole_vocabulary=True
    )[0]
  )(networks_without_adapters())
  mask = (
    np.cumsum(np.isin(rows["tokens"], networks.prompts.end), axis=1) - np.isin(rows["tokens"], networks.prompts.end)
    == 0
  )
  nll = -np.asarray(log_probs, np.float64)[:, 0]
  expected = (nll * mask).sum() / mask.sum()
  assert float(loss.mean) == pytest.approx(expected, rel=1e-5)
  assert float(metrics["caption_length"][0] / metrics["caption_length"][1]) == mask.sum() / ROWS
  means = [(nll * mask)[i::2].sum() / mask[i::2].sum() for i in (0, 1)]
  assert abs(np.mean(means) - expected) > 1e-4 * expected


def networks_without_adapters() -> dict:
  """The parameters with adapters that do nothing."""
  return jax.tree.map_with_path(
    lambda path, leaf: jnp.zeros_like(leaf) if "lora_b" in jax.tree_util.keystr(path) else leaf, params()
  )


def test_a_contrastive_loss_refuses_pieces():
  with nnx.use_eager_sharding(False):
    graphdef, _ = nnx.split(built().make_text_tower(nnx.Rngs(0)))
  loss = contrastive.make_loss(built().networks, "clip", graphdef, ContrastiveOptions())
  assert make_step(loss, optax.sgd(1.0))
  with pytest.raises(ValueError, match="num_microbatches = 2: this loss needs all rows"):
    make_step(loss, optax.sgd(1.0), num_microbatches=2)

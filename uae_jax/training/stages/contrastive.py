"""Base models: trains an image embedder and a text tower contrastively on pairs of image and caption.

Source: CLIP (arXiv 2103.00020) figure 3. Each scene comes with edited versions of itself, so that every batch contains
hard negatives.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from uae_jax.algorithms.losses import Loss, sum_and_count
from uae_jax.models.clip import CLIPText
from uae_jax.models.uae import to_signed
from uae_jax.networks import Networks
from uae_jax.options import ContrastiveOptions, Experiment
from uae_jax.training import row_draws
from uae_jax.training.build import Built
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.supervised import LossFunction, WholeBatch

MAX_LOGIT_SCALE = 50.0


def make_loss(networks: Networks, name: str, text_graphdef: nnx.GraphDef, options: ContrastiveOptions) -> LossFunction:
  """Makes the symmetric InfoNCE loss.

  Args:
    networks: provides the embedder `name`.
    name: name of the embedder that is trained.
    text_graphdef: graph definition of a `CLIPText`; its parameters and the logit scale are in `params["contrastive"]`.
    options: pixel noise.

  Returns:
    loss(params, batch, keys), which is not split into microbatches; batch: `image` uint8[B, V, H, W, 3], `tokens`
    int32[B, V, L], `identity` int[B, V], where V is the number of versions per scene.
  """

  def loss(params, batch, keys):
    images, tokens, identity = (
      batch[name].reshape(-1, *batch[name].shape[2:]) for name in ("image", "tokens", "identity")
    )
    level_keys, noise_keys = row_draws.split(keys, 2)
    x = to_signed(images)
    versions = x.shape[0] // keys.shape[0]
    level = row_draws.draw(jax.random.uniform, level_keys, versions).reshape(-1, 1, 1, 1)
    noise = row_draws.draw(jax.random.normal, noise_keys, versions, *x.shape[1:]).reshape(x.shape)
    x = x + options.pixel_noise_std * level * noise
    image = networks.embed(params, name, x)
    text = nnx.merge(text_graphdef, params["contrastive"]["text"])(tokens)
    text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
    logits = jnp.minimum(jnp.exp(params["contrastive"]["logit_scale"]), MAX_LOGIT_SCALE) * image @ text.T
    labels = jnp.arange(logits.shape[0])
    # A scene that occurs twice in a batch is not a negative of itself.
    is_twin = (identity[:, None] == identity[None, :]) & (labels[:, None] != labels[None, :])
    logits = jnp.where(is_twin, jnp.finfo(jnp.float32).min, logits)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    values = 0.5 * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))
    return Loss(*sum_and_count(values)), {"accuracy": sum_and_count(jnp.argmax(logits, axis=1) == labels)}

  return WholeBatch(loss)


def text_tower(built: Built, rngs: nnx.Rngs) -> CLIPText:
  """Makes the text tower that an embedder is trained with.

  Raises:
    ValueError: the model of the run has pre-trained embedders.
  """
  if built.make_text_tower is None:
    raise ValueError("config.model has pre-trained embedders and no text tower: expected a model trained from scratch")
  return built.make_text_tower(rngs)


def spec(name: str) -> StageSpec:
  """Makes the stage that trains the embedder `name`."""

  def loss(config: Experiment, built: Built) -> LossFunction:
    # The text tower belongs to this stage only; later stages do not use it.
    with nnx.use_eager_sharding(False):
      graphdef, _ = jax.eval_shape(lambda: nnx.split(text_tower(built, nnx.Rngs(0))))
    return make_loss(built.networks, name, graphdef, config.section(name).options)

  def extra_params(built: Built, key: jax.Array) -> dict:
    with nnx.use_eager_sharding(False):
      tower = nnx.state(text_tower(built, nnx.Rngs(jax.random.fold_in(key, 1))))
    return {"contrastive": {"text": nnx.to_pure_dict(tower), "logit_scale": jnp.log(jnp.float32(10.0))}}

  def finish(built: Built, params: dict, images: jax.Array) -> dict:
    del built, images
    return {net: tree for net, tree in params.items() if net != "contrastive"}

  return StageSpec(
    make_loss=loss,
    extra_params=extra_params,
    finish=finish,
    figures=lambda evaluator, folder, params, before: evaluator.embedder_figures(params, name),
  )

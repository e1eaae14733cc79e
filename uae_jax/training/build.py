"""Builds the networks of a run from their sizes: graph definitions, prompts, and an initializer of parameters."""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
from jax.sharding import Mesh

from uae_jax import sharding, trees
from uae_jax.data.processing import Processor
from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.embedders.kind import EmbedderSizes
from uae_jax.layers.buffer import Buffer
from uae_jax.models.clip import CLIPText
from uae_jax.models.prompts import Prompts
from uae_jax.models.system import SystemConfig
from uae_jax.networks import Networks
from uae_jax.options import DataOptions
from uae_jax.options.buckets import parse
from uae_jax.training.sizes import Sizes, find
from uae_jax.weights.checkpoint import typed


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
  """All static parts of a run.

  Attributes:
    networks: graph definitions, prompts, embedders.
    processor: tokenizer and image processor.
    sizes: sizes of all networks.
    abstract_params: nested dict of `ShapeDtypeStruct`s with shardings.
    buffers: paths of stored constants, which no stage trains.
    init: key -> random parameters with the structure of `abstract_params`.
    make_text_tower: makes a text tower for contrastive training; None for a model with pre-trained embedders.
  """

  networks: Networks
  processor: Processor
  sizes: Sizes
  abstract_params: dict
  buffers: frozenset[str]
  init: Callable[[jax.Array], dict]
  make_text_tower: Callable[[nnx.Rngs], CLIPText] | None

  @property
  def shardings(self) -> dict:
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)


def build(config, sizes: Sizes, processor: Processor, mesh: Mesh) -> Built:
  """Builds the networks, with prompts for square images of `config.data.image_px`.

  Args:
    config: image size, caption length, dtype and model name.
    sizes: sizes of all networks.
    processor: tokenizer and image processor of the captioner.
    mesh: mesh over which parameters are sharded.

  Raises:
    ValueError: heads or weights do not divide over the mesh, or the decoder cannot make images of a bucket.
  """
  uae = sizes.uae
  check_buckets(config.data, uae)
  for name, num_heads in (uae.heads | {name: size.network.num_heads for name, size in sizes.embedders.items()}).items():
    sharding.check_heads(name, num_heads, mesh)
  height, width = processor.resized_size(config.data.image_px, config.data.image_px)
  prompts = Prompts.from_processor(processor, (height // processor.patch_size, width // processor.patch_size))
  graphdef, abstract_uae = sharding.abstract_model(lambda: uae.build(nnx.Rngs(0)), mesh)

  def abstract_embedder(size: EmbedderSizes):
    return sharding.abstract_model(lambda: size.build(nnx.Rngs(0)), mesh)

  embedders, abstract_embedders = {}, {}
  for name, size in sizes.embedders.items():
    encoder_graphdef, abstract_embedders[name] = abstract_embedder(size)
    embedders[name] = EmbeddingNetwork(size.kind, encoder_graphdef, size.image_px, size.mean, size.std)
  buffers = frozenset(path for path, _ in trees.items(buffer_tree(graphdef, abstract_uae)))
  abstract = typed({**abstract_uae, "embedders": abstract_embedders}, config.dtype, exact=buffers)

  def init(key: jax.Array) -> dict:
    def fresh(make, key):
      with nnx.use_eager_sharding(False):
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))

    keys = jax.random.split(key, 1 + len(sizes.embedders))
    params = fresh(uae.build, keys[0])
    names = sorted(sizes.embedders)
    nets = {n: fresh(sizes.embedders[n].build, k) for n, k in zip(names, keys[1:], strict=True)}
    if nets:  # `abstract` has no empty branches.
      params = params | {"embedders": nets}
    return jax.tree.map(lambda x, want: x.astype(want.dtype), params, abstract)

  model, make_text_tower = find(config.model), None
  if model.text_tower is not None:
    text = model.text_tower(processor.vocab_size, config.data.caption_tokens, processor.end_ids[0])

    def make_text_tower(rngs: nnx.Rngs) -> CLIPText:
      return CLIPText(text, rngs=rngs)

  return Built(
    networks=Networks(graphdef, prompts, embedders),
    processor=processor,
    sizes=sizes,
    abstract_params=abstract,
    buffers=buffers,
    init=init,
    make_text_tower=make_text_tower,
  )


def check_buckets(data: DataOptions, uae: SystemConfig) -> None:
  """Checks that images of every bucket can be generated.

  Raises:
    ValueError: a bucket has another size.
  """
  for text, size in zip(data.buckets, parse(data.buckets), strict=True):
    try:
      uae.latents_shape(*size)
    except ValueError as error:
      raise ValueError(f"config.data.buckets names {text}, and the decoder cannot make {error}") from error


def buffer_tree(graphdef: nnx.GraphDef, abstract: dict) -> dict:
  """Returns the stored constants of a network as a tree of abstract arrays."""
  return nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, abstract), Buffer))

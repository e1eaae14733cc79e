"""Graph definitions of all networks, the static half of a run; a tree of parameters turns them into modules."""

import dataclasses

from flax import nnx
import jax

from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.layers import lora
from uae_jax.models.prompts import Prompts
from uae_jax.models.system import nets_of
from uae_jax.models.uae import UAE
from uae_jax.options import embedder_of


def merge_uae(graphdef: nnx.GraphDef, params: dict, *, adapters: bool = True) -> UAE:
  """Makes the UAE of a graph definition; adapters=False gives the reference policy on the same weights."""
  model: UAE = nnx.merge(graphdef, nets_of(params))
  return model if adapters else lora.adapters_off(model)


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
  """Graph definitions of the UAE and the embedders; hashed by identity, so a run should use one instance.

  Attributes:
    graphdef: graph definition of the UAE.
    prompts: templates as token ids.
    embedders: image embedders by name; their parameters are in `params["embedders"][name]`.
  """

  graphdef: nnx.GraphDef
  prompts: Prompts
  embedders: dict[str, EmbeddingNetwork]

  def uae(self, params: dict, *, adapters: bool = True) -> UAE:
    """Makes the UAE with parameters `params`; adapters=False gives the reference policy on the same weights."""
    return merge_uae(self.graphdef, params, adapters=adapters)

  def embed(self, params: dict, name: str, images: jax.Array) -> jax.Array:
    """Embeds images by an embedder, or their patches.

    Args:
      params: parameters of all networks.
      name: name of the embedder, or NAME_patches.
      images: float[B, H, W, 3] in [-1, 1].

    Returns:
      Unit-norm float32[B, E].
    """
    kind = embedder_of(name)
    network = self.embedders[kind]
    return (network if name == kind else network.embed_patches)(params["embedders"][kind], images)

"""The static half of a run: graph definitions of all nets. With a tree of parameters they become callable modules."""

import dataclasses

from flax import nnx
import jax

from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.layers import lora
from uae_jax.models.prompts import Prompts
from uae_jax.models.uae import NETS, UAE


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
  """Graph definitions; hashed by identity, so one instance serves a run.

  Attributes:
    graphdef: of the UAE.
    prompts: templates as token ids.
    embedders: image embedders by name; their parameters live under `params["embedders"][name]`.
  """

  graphdef: nnx.GraphDef
  prompts: Prompts
  embedders: dict[str, EmbeddingNetwork]

  def uae(self, params: dict, *, adapters: bool = True) -> UAE:
    """The UAE over `params`; without adapters it is the reference policy over the same weights."""
    model = nnx.merge(self.graphdef, {net: params[net] for net in NETS})
    return model if adapters else lora.adapters_off(model)

  def embed(self, params: dict, name: str, images: jax.Array) -> jax.Array:
    """Unit-norm embeddings float32[B, E] of images float[B, H, W, 3] in [-1, 1]."""
    return self.embedders[name](params["embedders"][name], images)

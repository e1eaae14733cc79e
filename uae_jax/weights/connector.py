"""Weight table of the connector: in official checkpoints, the `nn.Sequential` `projector` in the language model."""

from uae_jax.models.connector import ConnectorConfig
from uae_jax.weights.table import Row, linear

# The same files contain the language model, which has its own table.
IGNORED = {r"^(?!projector\.)": "the language model"}


def table(config: ConnectorConfig) -> tuple[Row, ...]:
  """Rows for every parameter of the connector: `projector.{0,2}.{weight,bias}`."""
  del config
  return linear("projector.0", "hidden") + linear("projector.2", "out")

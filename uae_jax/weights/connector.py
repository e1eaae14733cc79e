"""The connector in the official checkpoints: an `nn.Sequential` named `projector` in the language model's files."""

from uae_jax.models.connector import ConnectorConfig
from uae_jax.weights.table import Row, linear

# The same files hold the language model, which has its own table.
IGNORED = {r"^(?!projector\.)": "the language model"}


def table(config: ConnectorConfig) -> tuple[Row, ...]:
  """Rows of `projector.{0,2}.{weight,bias}`."""
  del config
  return linear("projector.0", "hidden") + linear("projector.2", "out")

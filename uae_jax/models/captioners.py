"""The kinds of captioners, one row per kind; the config of a kind builds its module."""

from uae_jax.models.qwen25_vl.model import Qwen25VLConfig

# Kind, as in `model.json` and `uae.json` -> class of the config, see `models.captioner.CaptionerConfig`.
CONFIGS = {
  "qwen25_vl": Qwen25VLConfig,
}
# The kind of a file that names none; it is not written.
DEFAULT = "qwen25_vl"

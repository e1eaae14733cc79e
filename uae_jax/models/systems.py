"""The kinds of systems, one row per kind; the config of a kind builds its module."""

from uae_jax.models.janus.system import JanusSystemConfig
from uae_jax.models.uae import UAEConfig
from uae_jax.plain import ByKind

# Kind, as in `model.json` and `uae.json` -> class of the config, see `models.system.SystemConfig`. The kind of a file
# that names none is the paper's; it is not written.
KINDS = ByKind({"uae": UAEConfig, "janus": JanusSystemConfig}, "uae")

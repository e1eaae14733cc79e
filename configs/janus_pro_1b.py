"""Janus-Pro-1B, as `janus_pro_7b.py`.

uae-jax plan  --config=configs/janus_pro_1b.py --topology=v5e:4x4
uae-jax train --config=configs/janus_pro_1b.py --workdir=/mnt/bucket/run --config.mesh.fsdp=16
"""

from configs import janus_pro_7b

sweep = janus_pro_7b.sweep


def get_config(arg=None):
  config = janus_pro_7b.get_config(arg)
  config.model = "janus_pro_1b"
  config.init.weights = "weights/Janus-Pro-1B"
  return config

"""UAE with the smaller decoder, SD3.5-medium: the model of Flow-GRPO's published settings.

uae-jax plan  --config=configs/uae_3b_sd35m.py:512 --topology=v5e:4x4
uae-jax train --config=configs/uae_3b_sd35m.py:512 --workdir=/mnt/bucket/run --config.mesh.fsdp=16

Everything else, sources included, is as in `uae_3b_sd35l.py`.
"""

from configs import uae_3b_sd35l

sweep = uae_3b_sd35l.sweep


def get_config(arg=None):
  config = uae_3b_sd35l.get_config(arg)
  config.model = "uae_3b_sd35_medium"
  # The official UAE folder contains the large decoder; this config starts from Qwen2.5-VL and SD3.5-medium folders.
  config.init.weights = "weights/qwen25_vl_3b_sd35_medium"
  return config

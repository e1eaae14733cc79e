"""UAE with the smaller decoder, SD3.5-medium: the model of Flow-GRPO's published settings.

uae-jax plan  --config=configs/uae_3b_sd35m.py:512 --topology=v5e:4x4
uae-jax train --config=configs/uae_3b_sd35m.py:512 --workdir=/mnt/bucket/run --config.mesh.fsdp=16

All else is `uae_3b_sd35l.py`, with its sources.
"""

from configs import uae_3b_sd35l

sweep = uae_3b_sd35l.sweep


def get_config(arg=None):
  config = uae_3b_sd35l.get_config(arg)
  config.model = "uae_3b_sd35_medium"
  # An official UAE folder holds the large decoder: this one starts from plain Qwen2.5-VL and SD3.5-medium folders.
  config.init.weights = "weights/qwen25_vl_3b_sd35_medium"
  return config

"""Every test sees 8 virtual CPU devices and full float32 matmuls; set before anything touches a jax backend."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flax
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
flax.config.update("flax_always_shard_variable", False)

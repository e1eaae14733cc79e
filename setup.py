"""Package metadata. Ranges are those the test suite was run with."""

from setuptools import find_packages, setup

setup(
  name="uae_jax",
  version="0.1.0",
  description="UAE (unified multimodal models as auto-encoders) and Unified-GRPO for TPU pods, in JAX",
  packages=find_packages(include=["uae_jax", "uae_jax.*"]),
  package_data={"uae_jax": ["report/*.html", "report/*.css"]},
  python_requires=">=3.11",
  install_requires=[
    "jax==0.10.2",
    "flax==0.12.8",
    "optax==0.2.8",
    "qwix>=0.1.8,<0.2",
    "orbax-checkpoint==0.12.8",
    "transformers>=5.23,<5.24",
    "grain>=0.2.18,<0.3",
    "tensorflow-datasets>=4.9.10,<4.10",
    "ml_collections>=1.1,<1.2",
    "clu>=0.0.12,<0.1",
    # clu's metric writers and TFDS need TensorFlow, for host code only.
    "tensorflow-cpu>=2.21,<2.22",
    "tensorboard",
    "numpy",
    "einops",
    "absl-py",
    "pillow",
    "safetensors",
    "tqdm",
    "jinja2",
  ],
  extras_require={
    # References for the parity tests; never imported by the package.
    "test": [
      "pytest>=9,<10",
      "pytest-xdist>=3.8,<4",
      "ruff",
      "scikit-image",
      "torch==2.13.0",
      "diffusers>=0.42,<0.43",
      "peft>=0.21,<0.22",
    ],
    "tpu": ["jax[tpu]==0.10.2"],
    "cuda": ["jax[cuda12]==0.10.2"],
    "aot": ["libtpu==0.0.42.*"],
  },
  entry_points={"console_scripts": ["uae-jax=uae_jax.cli:main"]},
)

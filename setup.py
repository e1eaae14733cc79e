"""Package metadata. Ranges are those the test suite was run with."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
  name="uae_jax",
  version="0.1.0",
  description="UAE (unified multimodal models as auto-encoders) and Unified-GRPO for TPU pods, in JAX",
  long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="The uae_jax authors",
  license="Apache-2.0",
  license_files=["LICENSE"],
  project_urls={"Paper": "https://arxiv.org/abs/2509.09666"},
  keywords=[
    "jax",
    "flax",
    "tpu",
    "multimodal",
    "image captioning",
    "text-to-image",
    "diffusion",
    "reinforcement learning",
    "grpo",
  ],
  classifiers=[
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Processing",
  ],
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
    "pyarrow>=26",
    "tqdm",
    "jinja2",
  ],
  extras_require={
    "test": [
      "pytest>=9,<10",
      "pytest-xdist>=3.8,<4",
      "ruff>=0.17,<0.18",
      "mypy>=2.4,<2.5",
      # The notebook is run from top to bottom.
      "nbclient>=0.11,<0.12",
      "ipykernel>=7.4,<8",
      "nbformat>=5.11,<6",
      # Read from a server of objects on the same machine.
      "gcsfs>=2026.10,<2027",
      # The client of `uae-jax serve`.
      "openai>=3.57,<4",
      # References for the parity tests; never imported by the package.
      "scikit-image",
      "torch==2.13.0",
      "diffusers>=0.42,<0.43",
      "peft>=0.21,<0.22",
    ],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1,<2"],
    # What .pre-commit-config.yaml runs besides ruff and mypy; a local hook takes it from the same environment.
    "dev": ["pre-commit>=4,<5", "pre-commit-hooks>=6,<7"],
    # Reads gs:// addresses.
    "gcs": ["gcsfs>=2026.10,<2027"],
    "wandb": ["wandb>=0.16"],
    # Scores captions in `uae-jax evaluate --suite captions`; brings torch, and loads models of its own.
    "capture": ["capture-metric>=0.1.13,<0.2"],
    "tpu": ["jax[tpu]==0.10.2", "gcsfs>=2026.10,<2027"],
    "cuda": ["jax[cuda12]==0.10.2"],
    "aot": ["libtpu==0.0.42.*"],
  },
  entry_points={"console_scripts": ["uae-jax=uae_jax.cli:main"]},
)

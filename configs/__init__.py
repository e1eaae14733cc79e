"""Experiment configs, one per file; each lists only its differences from the defaults in `uae_jax.options`."""

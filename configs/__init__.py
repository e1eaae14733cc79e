"""One experiment per file; each lists what differs from the defaults in `uae_jax.options`."""

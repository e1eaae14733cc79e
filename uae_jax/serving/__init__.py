"""The HTTP server of `uae-jax serve`, a subset of OpenAI's API."""

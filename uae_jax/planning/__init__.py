"""Cost of a stage on a TPU slice, from programs compiled for the slice without a TPU."""

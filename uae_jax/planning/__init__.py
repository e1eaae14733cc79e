"""What a stage costs on a TPU slice, from programs compiled for it without one."""

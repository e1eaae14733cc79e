"""Sampling from a policy: groups of captions on a shared prefix, conditioning, and images by ODE or SDE."""

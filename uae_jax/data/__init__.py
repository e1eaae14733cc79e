"""Sources, processors and the input pipeline; host code on NumPy arrays."""

"""Sources, processors and the input pipeline; host code, numpy in and out."""

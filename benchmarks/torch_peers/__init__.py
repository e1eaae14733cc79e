"""What one would use instead: transformers, diffusers and PEFT, the same work on the same weights, one suite a file."""

"""The HTML page of a run: figures, curves, galleries, captions over time, warnings."""

"""Sweeps: one config at many points, trained side by side and compared on one page."""

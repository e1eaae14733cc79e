"""Rewards: similarity of reconstruction and original, text rewards, external rewards, and their weighted ensemble."""

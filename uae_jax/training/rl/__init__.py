"""Reinforcement learning shared by stages 2 and 3: phases, updates, external rewards and image policies."""

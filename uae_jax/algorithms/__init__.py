"""Pure mathematics on arrays: flow matching, samplers, advantages, policy objectives. Knows no model.

Batch axes in words, [prompts, rollouts]; W steps of a window, L tokens. Equations are in the docstrings, with their
sources.
"""

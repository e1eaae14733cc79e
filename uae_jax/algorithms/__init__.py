"""Pure functions on arrays, independent of any model: flow matching, samplers, advantages, policy objectives.

Batch axes are spelled out, [prompts, rollouts]; W is the number of steps in a window, L the number of tokens. The
docstrings give equations and their sources.
"""

"""Layers shared by the models.

Letters in einsums and shapes: B batch, T query tokens, S key/value tokens, P prefix tokens, R rollouts per group, D
model width, F MLP width, N query heads, K key/value heads, G query heads per key/value head, H head width, V
vocabulary size, L layers, r LoRA rank. Images are NHWC.
"""

"""Layers shared by the models.

Letters in einsums and shapes: B batch, T query tokens, S key/value tokens, P prefix tokens, R rollouts of a group, D
model width, F mlp width, N query heads, K key/value heads, G query heads a kv head, H head width, V vocabulary, L
layers, r LoRA rank. Images are NHWC.
"""

"""Qwen2.5-VL: a vision tower with window attention in front of a language model with multimodal rotary positions."""

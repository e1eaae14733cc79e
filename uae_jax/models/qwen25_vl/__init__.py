"""Qwen2.5-VL: a vision tower with window attention, and a language model with multimodal rotary positions."""

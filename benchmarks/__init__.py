"""Benchmarks of speed, memory and learning; run by hand, never by the tests."""

"""Checkpoint folders: safetensors files, index, layouts. Knows nothing of searches or trainers."""

"""The families of decoders through quantization: `python -m benchmarks.families`."""

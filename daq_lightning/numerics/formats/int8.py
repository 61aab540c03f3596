"""Integers of 8 bits, symmetric: -128 to 127, one scale per output channel (W8A8).

Plain quantization maps the largest magnitude of a channel to 127.5, the middle of the range of 255 steps.

Source: compressed-tensors 0.20, `calculate_qparams` and `calculate_range`.
"""

from __future__ import annotations

from daq_lightning.numerics.formats import Format

INT8 = Format(
    dtype_name="int8", max=127.0, lowest=-128.0, reach=127.5, min_normal=64.0, mantissa_bits=6, bits=8
)

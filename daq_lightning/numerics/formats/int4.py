"""Integers of 4 bits: -8 to 7, one scale for 128 (or 32) weights of a row (W4A16).

Plain quantization maps the largest magnitude of a group to 7.5, the middle of the range of 15 steps.

Source: compressed-tensors 0.20, `calculate_qparams` and `calculate_range`.
"""

from __future__ import annotations

from daq_lightning.numerics.formats import Format

INT4 = Format(dtype_name="int8", max=7.0, lowest=-8.0, reach=7.5, min_normal=4.0, mantissa_bits=2, bits=4)

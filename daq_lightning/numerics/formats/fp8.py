"""FP8 as inference engines use it: E4M3 in the variant without infinities.

Source: OCP 8-bit floating point specification (OFP8), revision 1.0, table 1.
"""

from __future__ import annotations

from daq_lightning.numerics.formats import Format

FP8_E4M3 = Format(dtype_name="float8_e4m3fn", max=448.0, min_normal=2.0**-6, mantissa_bits=3)

"""A format that no layout knows, as data: E5M2, which is all that adding a format takes."""

from daq_lightning.numerics.formats import Format

E5M2 = Format(dtype_name="float8_e5m2", max=57344.0, min_normal=2.0**-14, mantissa_bits=2)

"""Pure arithmetic on tensors: formats, tiling, rounding, objectives, search. No files, no names, no Lightning."""

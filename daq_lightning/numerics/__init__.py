"""Pure arithmetic on tensors: formats, rounding, objectives, search, backends; no files, no Lightning."""

"""Pure arithmetic on tensors: formats, rounding, objectives, search, backends. No files, no names, no Lightning."""

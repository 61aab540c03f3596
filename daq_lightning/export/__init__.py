"""The hall: two mappings of weights in, one folder out."""

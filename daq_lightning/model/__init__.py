"""A model in memory: names, roles, adapters, whole weights."""

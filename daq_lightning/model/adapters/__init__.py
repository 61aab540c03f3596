"""PEFT adapters of a model in memory."""

"""The live model inside a Trainer: its weights under checkpoint names, its adapters, its base."""

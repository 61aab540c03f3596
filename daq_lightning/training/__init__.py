"""The live model inside a Trainer: its weights, its adapters, its base."""

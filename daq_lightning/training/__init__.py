"""The Trainer: when to take the base, when to export."""

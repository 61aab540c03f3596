"""Delta-aware FP8 export for models fine-tuned with Lightning."""

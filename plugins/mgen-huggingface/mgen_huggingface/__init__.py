"""Backbones published on the Hugging Face hub: ESM2, ESM C, and any encoder."""

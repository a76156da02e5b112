"""Sfumato: Stable Diffusion-class image models, trained with DeepSpeed itself."""

__version__ = "0.1.0"

"""Sfumato: Stable Diffusion-class image models, trained with DeepSpeed itself."""

import logging

__version__ = "0.1.0"

# DeepSpeed, diffusers and peft import it where it is installed, used or not; it says which kernels it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

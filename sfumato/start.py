"""What a run and a cache begin with: the ranks, the plan that they share, and the model's family."""

import torch

from sfumato import models
from sfumato.check import Plan, check
from sfumato.config import Config
from sfumato.engine import ranks
from sfumato.engine.engine import DTYPES
from sfumato.engine.ranks import Ranks
from sfumato.models.family import Family


def begin(config: Config) -> tuple[Ranks, Plan]:
    """This process's place, and what the run will do.

    The first rank looks at the data, and makes their index if need be, before the others open it.
    """
    place = ranks.start(config.engine.timeout)
    if not place.first:
        place.barrier()
    plan = check(config, place.world, place.device.type, verify=place.first, tell=print)
    if place.first:
        place.barrier()
    return place, plan


def load_family(config: Config, place: Ranks) -> Family:
    """The model's family, with the frozen parts that encode while training."""
    cache = config.data.cache
    images, captions = cache in ("none", "captions"), cache in ("none", "images")
    return models.load(config.model, place.device, *frozen_dtypes(config), images, captions)


def frozen_dtypes(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Arithmetic of the frozen text encoders and of the frozen VAE, which never runs in fp16."""
    precision = config.engine.precision
    vae = config.model.vae_dtype
    if vae == "auto":
        vae = "bf16" if precision == "bf16" else "fp32"
    return DTYPES[precision], DTYPES[vae]

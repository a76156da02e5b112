"""What a run and a cache begin with: the ranks, the plan that they share, and the model's family."""

from typing import Any

import torch
import torch.distributed as dist

from sfumato import models, prior
from sfumato.check import Plan, check
from sfumato.config import Config
from sfumato.engine import ranks
from sfumato.engine.ranks import Ranks
from sfumato.models.family import Family
from sfumato.models.loading import DTYPES
from sfumato.prior.fill import fill
from sfumato.watch import MARGIN


def begin(config: Config) -> tuple[Ranks, Plan]:
    """This process's place, and what the run will do, after the class images that it needs are drawn.

    The first rank looks at the data, and makes their index if need be, before the others open it.
    """
    # Who hangs is named by the watch; the group's own error names nobody, so it comes later.
    place = ranks.start(config.engine.timeout + MARGIN)
    if prior.drawn(config):
        config = with_class_images(config, place)
    if not place.first:
        place.barrier()
    plan = check(config, place.world, place.device.type, verify=place.first, tell=print)
    if place.first:
        place.barrier()
    return place, plan


def with_class_images(config: Config, place: Ranks) -> Config:
    """The config with the prior's pictures as its source; all ranks together draw those that are missing.

    The first rank looks at everything else before, so that what can be refused is refused.
    """
    found: list[Any] = [None, None]
    if place.first:
        plan = check(config, place.world, place.device.type, tell=print)
        assert plan.pictures is not None, "the plan knows of no class images"
        plan.pictures.note(config.folder)
        found = [plan.pictures, plan.missing]
    dist.broadcast_object_list(found)
    pictures, missing = found
    fill(config, pictures, missing, place, *frozen_dtypes(config))
    return pictures.given(config)


def load_family(config: Config, place: Ranks) -> Family:
    """The model's family, with the frozen parts that encode while training."""
    cache = config.data.cache
    images, captions = cache in ("none", "captions"), cache in ("none", "images")
    captions = captions and not config.learns_text
    return models.load(config.model, place.device, *frozen_dtypes(config), images, captions)


def frozen_dtypes(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Arithmetic of the frozen text encoders and of the frozen VAE, which never runs in fp16."""
    precision = config.engine.precision
    vae = config.model.vae_dtype
    if vae == "auto":
        vae = "bf16" if precision == "bf16" else "fp32"
    return DTYPES[precision], DTYPES[vae]

"""The sizes that a run trains at, and what a sample of them costs."""

from collections.abc import Mapping
from dataclasses import replace

from sfumato.config import Checkpointing, Config
from sfumato.data.aspects import sizes
from sfumato.engine.ds_config import autocast
from sfumato.models.folder import Facts
from sfumato.planner.trace import Cost, trace
from sfumato.planner.ways import Way

Size = tuple[int, int]
LAUNCHED = {"full": 3, "controlnet": 6, "lora": 8, "textual_inversion": 8}
"""Kernels of a micro-batch for each tensor that learns: SDXL has 4,985 for 1,680, with LoRA 9,041 for 1,120,
SD 1.5 1,950 for 686 (counted with torch on the meta device). Of the other two nothing was counted."""
HOSTED: Mapping[Checkpointing, float] = {False: 1.0, True: 1.45, "selective": 1.65}
"""What kernels cost the host, over that without checkpointing: a toy SDXL's step of 41 ms, nearly all the
host's time, takes 60 with everything computed again, and 68 where it is asked about each operation, on one
core of a CPU (docs/speed.md)."""
FEWEST = 2000
"""Kernels of a forward and backward pass through the smallest of these models."""


def sizes_of(config: Config) -> list[Size]:
    """Every (height, width) that the settings allow, by area; needs no data."""
    found = {size for base in config.data.resolutions for size in sizes(config.data, base)}
    return sorted(found, key=lambda size: (size[0] * size[1], size))


def cost_of(config: Config, facts: Facts, way: Way, size: Size) -> Cost:
    """What a sample of a size costs in a way.

    Where weights wait, and how they are cut up, changes nothing of it; nor does which half precision it is.
    """
    stage = 0 if autocast(way.of(config)) else 1
    precision = "bf16" if way.precision == "fp16" and config.model.vae_dtype != "auto" else way.precision
    plain = replace(way, stage=stage, offload="none", precision=precision)
    return trace(plain.of(config), facts, size)


def launches(config: Config, cost: Cost) -> int:
    """How many kernels a micro-batch starts, roughly; dearer ones count for more."""
    plain = max(FEWEST, LAUNCHED[config.method.kind] * len(cost.trained))
    return round(plain * HOSTED[config.engine.gradient_checkpointing])

"""What does not stay on the device: where the step is made, and what is refused before a model is loaded.

DeepSpeed moves fp32 weights and states to the host's memory at stages 1 to 3, and weights at 3. The step is
torch's own AdamW there, which needs no compiler; so the numbers are those of a run that moves nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import Config
from sfumato.errors import UserError

if TYPE_CHECKING:
    import torch


def stepping(config: Config, device: "torch.device") -> "torch.device":
    """Where the optimizer's tensors lie."""
    import torch

    return device if config.engine.offload_optimizer == "none" else torch.device("cpu")


def host_memory() -> int:
    """Bytes of this machine's memory, or what the control group allows of it."""
    import psutil

    found = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return found
    return min(found, int(limit)) if limit.isdigit() else found


def check_places(config: Config) -> None:
    """Raise UserError for a place where nothing can be moved to, at any stage."""
    engine = config.engine
    for name, place in (("optimizer", engine.offload_optimizer), ("parameters", engine.offload_parameters)):
        if place == "nvme":
            raise UserError(
                f'engine.offload_{name} = "nvme"',
                "checkpoints and averages look for the weights in memory, and none of it has been run with "
                "DeepSpeed's files",
                f'set engine.offload_{name} = "cpu"',
            )


def check(config: Config, world: int) -> None:
    """Raise UserError for an offload or a sharding over neighbours that cannot be."""
    engine = config.engine
    check_places(config)
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        raise UserError(
            f'engine.offload_optimizer = "{engine.offload_optimizer}" with engine.zero_stage = 0',
            "there the optimizer steps the device's own weights, of which there are no others to move",
            "set engine.zero_stage = 1, which costs nothing more, or 2, which takes gradients away as well",
        )
    if engine.offload_parameters != "none" and engine.zero_stage < 3:
        raise UserError(
            f'engine.offload_parameters = "{engine.offload_parameters}" with engine.zero_stage = '
            f"{engine.zero_stage}",
            "only stage 3 brings a layer's weights to the device when their turn comes",
            'set engine.zero_stage = 3, or offload the optimizer alone: engine.offload_optimizer = "cpu"',
        )
    check_neighbours(config, world)


def check_neighbours(config: Config, world: int) -> None:
    """Raise UserError for ZeRO++'s second copy of the weights where it cannot be made."""
    key = "zero_hpz_partition_size"
    ranks = config.engine.deepspeed.get("zero_optimization", {}).get(key, 1)
    if ranks == 1:
        return
    asked = f"[engine.deepspeed] zero_optimization.{key} = {ranks}"
    if config.engine.zero_stage != 3:
        found = f"weights are in parts at stage 3 only, and engine.zero_stage = {config.engine.zero_stage}"
        raise UserError(asked, found, "remove it, or set engine.zero_stage = 3")
    if not isinstance(ranks, int) or ranks < 1 or world % ranks:
        found = f"{world} ranks are not made of groups of {ranks}"
        raise UserError(asked, found, "set it to the ranks of one machine, which divide all")

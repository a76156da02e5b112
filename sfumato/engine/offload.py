"""What does not stay on the device: where the step is made, and what is refused before a model is loaded.

DeepSpeed moves fp32 weights and states to the host's memory at stages 1 to 3, and weights at 3; or, at stage
3, fp32 weights and states to a disk. The step is torch's own AdamW on the host, which needs no compiler; so
the numbers are those of a run that moves nothing.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import Config
from sfumato.engine.ds_config import offloaded
from sfumato.engine.size import readable
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


def check(config: Config, world: int) -> None:
    """Raise UserError for an offload or a sharding over neighbours that cannot be."""
    engine = config.engine
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
    if engine.offload_optimizer == "nvme" and engine.zero_stage != 3:
        raise UserError(
            f'engine.offload_optimizer = "nvme" with engine.zero_stage = {engine.zero_stage}',
            "DeepSpeed reads and writes a disk at stage 3 only",
            'set engine.zero_stage = 3, or engine.offload_optimizer = "cpu"',
        )
    if engine.offload_optimizer == "nvme" and engine.nvme_path is None:
        raise UserError(
            'engine.offload_optimizer = "nvme"',
            "no folder is named where the optimizer's files may lie",
            "set engine.nvme_path to a folder on a fast local disk",
        )
    check_neighbours(config, world)


def check_disk(config: Config, needed: int, group: int) -> None:
    """Raise UserError unless the optimizer can lie in `engine.nvme_path` and be read from there.

    needed: bytes of all of this machine's ranks. group: numbers that a rank steps at once. What a crash has
    left there is removed.
    """
    from sfumato.engine import swap

    folder = config.engine.nvme_path
    assert folder is not None, "it is looked at where it is set"
    asked = f"engine.nvme_path = {str(folder)!r}"
    if not folder.is_dir():
        raise UserError(asked, "there is no such folder", "make it, on a fast local disk")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(asked, "it cannot be written to", "change its owner, or name another folder")
    swap.clean(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        found = f"at least {readable(needed)} are needed there, and {readable(free)} are free"
        raise UserError(asked, found, "make room, or name a folder on a larger disk")
    try:
        swap.probe(folder)
    except OSError as error:
        raise UserError(
            asked,
            f"its disk takes no kilobyte past the system's cache (O_DIRECT): {error.strerror}",
            "name a folder on a local disk with ext4 or xfs, whose sectors are of 512 bytes",
        ) from None
    room = offloaded(config)["offload_optimizer"]["buffer_count"] * 4 * group
    try:
        swap.lock(max(room, 2**20))
    except OSError as error:
        raise UserError(
            'engine.offload_optimizer = "nvme"',
            f"each rank locks {readable(room)} of memory for it, and may not: {error.strerror}",
            "raise `ulimit -l` (Docker: --ulimit memlock=-1), or set [engine.deepspeed] zero_optimization."
            "sub_group_size lower",
        ) from None
    check_reader()


def check_reader() -> None:
    """Raise UserError unless DeepSpeed's reader of disks is compiled, or can be at the start."""
    from sfumato.engine import reader

    asked = 'engine.offload_optimizer = "nvme"'
    if lock := reader.stale_lock():
        raise UserError(
            asked,
            f"{lock} says that a process compiles DeepSpeed's reader of disks, but nothing moves beside it; "
            "torch would wait for it without end",
            "see that no process compiles there, and remove that file",
        )
    if lacking := reader.lacking():
        raise UserError(
            asked,
            f"DeepSpeed's reader of disks is not compiled, and cannot be without {lacking}",
            "install it (Debian: apt-get install g++ ninja-build libaio-dev)",
        )


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

"""Who am I among the ranks: the process group, its device, and the few collectives that a run needs."""

import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from sfumato.device import accelerator, settle
from sfumato.errors import UserError
from sfumato.launch import supervised

# DeepSpeed would compile a shared-memory all-reduce for CPU ranks at the first start. A build that was killed
# leaves a lock on which every later start waits for ever, and gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world`, computing on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks, at most the group's timeout."""
        # Without the number torch may take another rank's device for it, and warns of that.
        dist.barrier(device_ids=None if self.device.type == "cpu" else [self.device.index])

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor that all hold."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives, in the order of ranks, on all of them."""
        every = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(every, value)
        return every

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is true on one."""
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())


def start(timeout: float) -> Ranks:
    """Join the process group that the environment describes, or make a group of one.

    timeout: seconds after which a collective that some rank does not reach ends in an error.
    """
    # DeepSpeed's own calls of it: nothing that a user could mend.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor", FutureWarning)
    warnings.filterwarnings("ignore", r".*reduce_scatter_tensor", FutureWarning)
    seam = accelerator()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settle()
    on_cpu = seam.device_name() == "cpu"
    if not on_cpu:
        # A launcher may show each rank its own device only; then that is number 0.
        local, devices = int(os.environ["LOCAL_RANK"]), seam.device_count()
        if local >= devices and (devices > 1 or supervised()):
            raise UserError(
                f"rank {os.environ['RANK']} as number {local} of this machine",
                f"it has {devices} device{'s' * (devices != 1)}",
                f"start at most {devices} rank{'s' * (devices != 1)} here",
            )
        if devices == 1:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed takes it for the device's number
        seam.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if on_cpu else seam.communication_backend_name()
    limit = timedelta(seconds=timeout)
    # DeepSpeed sends gradients through groups of its own, to which it gives no time.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, auto_mpi_discovery=False, verbose=False)
    device = torch.device(seam.current_device_name())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)

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
from deepspeed.accelerator import get_accelerator

from sfumato.errors import UserError

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
        dist.barrier()

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
    accelerator = get_accelerator()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        # A launcher may show each rank its own device only; then that is number 0.
        local, devices = int(os.environ["LOCAL_RANK"]), accelerator.device_count()
        if local >= devices > 1:
            raise UserError(
                f"rank {os.environ['RANK']} as number {local} of this machine",
                f"it has {devices} devices",
                f"start at most {devices} ranks here",
            )
        accelerator.set_device(local if devices > 1 else 0)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    deepspeed.init_distributed(
        dist_backend=backend, timeout=timedelta(seconds=timeout), auto_mpi_discovery=False, verbose=False
    )
    device = torch.device(accelerator.current_device_name())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)

"""Settings under which DeepSpeed is known to compute wrong numbers, or not at all: a table, cell by cell.

Such a run would look healthy, so it is refused before it starts, and `sfumato doctor` says why. A cell stays
here when it is mended, with the first version that is right: somebody may have an older one installed.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.config import Config
from sfumato.engine import offload
from sfumato.engine.ds_config import ds_config
from sfumato.engine.ds_keys import check_nested_keys, dotted
from sfumato.errors import UserError

FLOOR = "0.19.8"
"""The oldest DeepSpeed whose gradients the tests have compared with plain torch's."""


@dataclass(frozen=True)
class Setting:
    """A run as far as cells depend on it; `keys` is the whole DeepSpeed configuration, dotted."""

    config: Config
    world: int
    accelerator: str
    accumulation: int
    keys: Mapping[str, Any]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.config.engine.zero_stage

    @property
    def bf16(self) -> bool:
        """Whether the weights themselves are bf16."""
        return bool(self.keys["bf16.enabled"])

    @property
    def away(self) -> bool:
        """Whether the optimizer steps elsewhere."""
        return self.zero("offload_optimizer.device") not in (None, "none")

    @property
    def overlaps(self) -> bool:
        """Whether gradients of stages 1 and 2 are summed beside the backward pass; a CPU has one queue."""
        return self.stage in (1, 2) and bool(self.zero("overlap_comm")) and self.accelerator != "cpu"

    def zero(self, key: str) -> Any:
        """A key of zero_optimization; None where it is not set."""
        return self.keys.get(f"zero_optimization.{key}")


@dataclass(frozen=True)
class Cell:
    """One of them: in versions `since` <= v < `good`, where `when` holds."""

    issue: str
    what: str
    do: str
    when: Callable[[Setting], bool]
    since: str = "0"
    good: str | None = None
    """The first version that is known to be right; None: none is."""

    def holds(self, setting: Setting, version: str) -> bool:
        """Whether the setting is in this cell under a version of DeepSpeed."""
        old = self.good is None or numbers(version) < numbers(self.good)
        return numbers(self.since) <= numbers(version) and old and self.when(setting)


NEWER = f"install deepspeed {FLOOR} or newer"
QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
OTHERS = ("tensor_parallel", "expert_parallel", "hybrid_engine", "pipeline", "weight_quantization")
TRIED = f"tried with DeepSpeed {FLOOR}"
# Where a version is named, the code of that release and of the one before were read: the first has the line
# that is at fault or the one that mends it, the other has not.
CELLS = (
    Cell(
        "DeepSpeed issue 7718, mended by pull request 7665",
        "ZeRO stage 2 keeps the gradient of the last micro-batch alone",
        NEWER,
        lambda run: run.stage == 2 and run.accumulation > 1 and not run.away,
        "0.17.6",
        "0.18.3",
    ),
    # Its reporter found 0.18.2 right and 0.18.3 to 0.19.3 wrong. The mend that he was given, pull request
    # 8245, is in no release up to 0.19.8, whose gradients were right in a matrix of our own.
    Cell(
        "DeepSpeed issue 8224",
        "ZeRO stage 2 in bf16 sums wrong gradients for a layer that is used twice in a step",
        NEWER,
        lambda run: run.stage == 2 and run.bf16 and run.world > 1 and not run.away,
        "0.18.3",
        FLOOR,
    ),
    Cell(
        "DeepSpeed pull request 7965",
        "overlap_comm at stages 1 and 2 reads buffers that are in use again: losses that are not finite",
        NEWER,
        lambda run: run.overlaps,
        good="0.19.0",
    ),
    Cell(
        "DeepSpeed issue 8061, mended by pull request 8080",
        "overlap_comm with compiled backward passes adds up gradients that are not there yet",
        NEWER,
        lambda run: run.overlaps and run.config.engine.compile,
        good="0.19.3",
    ),
    Cell(
        "DeepSpeed pull request 7985",
        "ZeRO stage 1 in bf16 with fp32 sums leaves the last micro-batch out of the sum over ranks",
        NEWER,
        lambda run: (
            run.stage == 1
            and run.bf16
            and run.keys["data_types.grad_accum_dtype"] == "fp32"
            and run.world > 1
            and not run.away
        ),
        "0.18.3",
        "0.19.0",
    ),
    Cell(
        "DeepSpeed pull request 7967",
        "ZeRO stage 2 with an offloaded optimizer drops all micro-batches but the first and the last",
        NEWER,
        lambda run: run.stage == 2 and run.accumulation > 2 and run.away,
        "0.15.2",
        "0.19.0",
    ),
    Cell(
        "DeepSpeed pull request 8382",
        "on CPUs without contiguous_gradients no gradient is summed over the ranks",
        NEWER,
        lambda run: (
            run.accelerator == "cpu"
            and run.stage in (1, 2)
            and run.world > 1
            and not run.zero("contiguous_gradients")
            and not run.away
        ),
        good="0.19.8",
    ),
    Cell(
        TRIED,
        "gradients of the ranks are added up, not averaged: as many times too long",
        "remove gradient_allreduce_op",
        lambda run: run.keys.get("gradient_allreduce_op") == "sum" and run.world > 1,
    ),
    Cell(
        TRIED,
        "DeepSpeed would take each micro-batch for a whole batch",
        "remove managed_gradient_accumulation",
        lambda run: run.keys.get("managed_gradient_accumulation") is False,
    ),
    Cell(
        TRIED,
        "there is no gradient norm to clip by, to log, or to see a bad gradient by",
        "remove zero_optimization.compute_grad_norm",
        lambda run: run.zero("compute_grad_norm") is False,
    ),
    Cell(
        f"tensor_parallel was {TRIED}, the others were not",
        "it cuts up or replaces the module: with tensor_parallel its weights are not found",
        f"remove {', '.join(OTHERS)}",
        lambda run: any(key in run.keys for key in OTHERS),
    ),
    Cell(
        TRIED,
        "DeepSpeed's key compile does nothing by itself",
        "remove it, and set engine.compile = true",
        lambda run: "compile" in run.keys,
    ),
    Cell(
        TRIED,
        "quantised weights and gradients of ZeRO++ have no kernels on CPUs",
        "unset zero_quantized_weights and zero_quantized_gradients",
        lambda run: run.accelerator == "cpu" and any(map(run.zero, QUANTIZED)),
    ),
    Cell(
        TRIED,
        "ZenFlow fails on CPUs",
        "unset zero_optimization.zenflow",
        lambda run: run.accelerator == "cpu" and run.zero("zenflow") is not None,
    ),
    Cell(
        "tried with torch 2.13",
        "inductor's kernels in bf16 on CPUs give gradients that are half wrong",
        "set engine.compile = false, or engine.precision = fp32",
        lambda run: (
            run.accelerator == "cpu" and run.config.engine.compile and run.config.engine.precision == "bf16"
        ),
    ),
    Cell(
        "the tests' matrix of gradients",
        f"below {FLOOR} no cell was compared with plain torch, and several are known to be wrong",
        NEWER,
        lambda run: True,
        good=FLOOR,
    ),
)


def found(config: Config, world: int, accelerator: str, version: str | None = None) -> Iterator[Cell]:
    """The cells that a run would be in.

    world: ranks over all machines. accelerator: DeepSpeed's name for it. version: of DeepSpeed; unset: the
    installed one. Raises UserError where batch_size does not go into the ranks.
    """
    settings = ds_config(config, world)
    run = Setting(config, world, accelerator, config.accumulation(world), dict(dotted(settings)))
    installed = version or importlib.metadata.version("deepspeed")
    yield from (cell for cell in CELLS if cell.holds(run, installed))


def check_cells(config: Config, world: int, accelerator: str) -> None:
    """Raise UserError for a run in a known-bad cell, the first one, and for what DeepSpeed refuses."""
    offload.check(config, world)
    if config.engine.deepspeed:
        check_nested_keys(config, world)
    for cell in found(config, world, accelerator):
        asked = f"ZeRO stage {config.engine.zero_stage} in {config.engine.precision} with DeepSpeed "
        asked += importlib.metadata.version("deepspeed")
        raise UserError(asked, f"{cell.what} ({cell.issue})", cell.do)


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: "0.19.8+cpu" is (0, 19, 8)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])

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
CELLS = (
    Cell(
        "DeepSpeed issue 7718",
        "gradients of ZeRO stage 2 are too small",
        NEWER,
        lambda run: run.stage == 2,
        "0.17.6",
        "0.18.3",
    ),
    Cell(
        "DeepSpeed issue 8224",
        "ZeRO stage 2 in bf16 sums wrong gradients for a layer that is used twice in a step",
        NEWER,
        lambda run: run.stage == 2 and run.bf16 and run.world > 1,
        "0.18.3",
        FLOOR,
    ),
    Cell(
        "DeepSpeed pull request 7965",
        "overlap_comm at stages 1 and 2 reads buffers that are in use again: losses that are not finite",
        NEWER + ", or set zero_optimization.overlap_comm = false",
        lambda run: run.stage in (1, 2) and bool(run.zero("overlap_comm")) and run.accelerator != "cpu",
        good="0.19.0",
    ),
    Cell(
        "DeepSpeed issue 8061",
        "overlap_comm with compiled backward passes adds up gradients that are not there yet",
        NEWER + ", or leave out one of the two",
        lambda run: run.stage in (1, 2) and bool(run.zero("overlap_comm")) and "compile" in run.keys,
        good=FLOOR,
    ),
    Cell(
        "DeepSpeed pull request 7985",
        "ZeRO stage 1 with fp32 sums lets the last micro-batch leak into the next step",
        NEWER,
        lambda run: run.stage == 1 and run.keys["data_types.grad_accum_dtype"] == "fp32",
        good=FLOOR,
    ),
    Cell(
        "DeepSpeed pull request 7981",
        "an offloaded optimizer drops all but the last micro-batch's gradient",
        NEWER,
        lambda run: run.accumulation > 1 and bool(run.zero("offload_optimizer.device") not in (None, "none")),
        good=FLOOR,
    ),
    Cell(
        "DeepSpeed pull request 8382",
        "on CPUs without contiguous_gradients and reduce_scatter no gradient is summed over the ranks",
        NEWER,
        lambda run: (
            run.accelerator == "cpu"
            and run.stage in (1, 2)
            and not run.zero("contiguous_gradients")
            and not run.zero("reduce_scatter")
        ),
        good=FLOOR,
    ),
    Cell(
        "tried with DeepSpeed 0.19.8",
        "quantised weights and gradients of ZeRO++ have no kernels on CPUs",
        "unset zero_quantized_weights and zero_quantized_gradients",
        lambda run: run.accelerator == "cpu" and any(map(run.zero, QUANTIZED)),
    ),
    Cell(
        "tried with DeepSpeed 0.19.8",
        "ZenFlow fails on CPUs",
        "unset zero_optimization.zenflow",
        lambda run: run.accelerator == "cpu" and run.zero("zenflow") is not None,
    ),
    Cell(
        "tried with torch 2.13",
        "inductor's kernels in bf16 on CPUs give gradients that are half wrong",
        "remove the key compile, or take engine.precision = fp32",
        lambda run: (
            run.accelerator == "cpu" and "compile" in run.keys and run.config.engine.precision == "bf16"
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

"""Everything that can be refused before a model is loaded, in one message; else what the run will do.

    plan = check(config, world=8, accelerator="cuda")
    print(plan)

A plan has already opened what it looked at: `plan.facts` and `plan.source` need not be read again.
"""

import contextlib
import difflib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.data.sources import Source, open_source
from sfumato.engine.ds_config import OWNED, ds_config
from sfumato.errors import UserError
from sfumato.models.folder import Facts, examine, learned, weight_files

# DeepSpeed 0.19.8 reads these top-level keys; others it ignores without a word. A test compares the two.
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler
    fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
STATES = {"adamw": 2, "sgd": 0}
"""fp32 numbers that an optimizer keeps for each weight, in a checkpoint too."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, after everything that could be refused was looked at."""

    config: Config
    world: int
    accelerator: str
    accumulation: int
    facts: Facts
    source: Source
    parameters: int | None
    """Trained weights; None where they start from random numbers."""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Pairs of a heading and what is planned."""
        config, facts = self.config, self.facts
        size = f", {self.parameters / 1e6:,.1f} M weights" if self.parameters else ""
        yield "model", f"{facts.family} from {facts.folder}: {learned(facts.components)}{size}"
        yield "images", f"{len(self.source):,} from {config.data.source}, at {config.data.resolution} pixels"
        yield (
            "batch",
            f"{config.batch_size} = {config.micro_batch_size} on {self.world} {self.accelerator} "
            f"rank{'s' * (self.world > 1)}, {self.accumulation} time{'s' * (self.accumulation > 1)}",
        )
        epochs = config.steps * config.batch_size / len(self.source)
        yield "steps", f"{config.steps:,}, which see each image {epochs:,.1f} times"
        yield "numbers", f"{config.engine.precision}, ZeRO stage {config.engine.zero_stage}"
        room = checkpoint_bytes(config, self.parameters or 0)
        yield "folder", f"{config.folder}" + (f" (a checkpoint takes {room / 1e9:,.2f} GB)" if room else "")

    def __str__(self) -> str:
        return "\n".join(f"{heading:>8}  {text}" for heading, text in self.lines())


def check(config: Config, world: int, accelerator: str) -> Plan:
    """Look at everything that does not need a model.

    world: ranks, over all machines. accelerator: DeepSpeed's name for it, such as "cpu" or "cuda".
    Raises one UserError with all that was found.
    """
    faults: list[UserError] = []
    steps, facts, source, parameters = 0, None, None, None
    with noted(faults):
        steps = config.accumulation(world)
    with noted(faults):
        check_precision(config, accelerator)
    faults += deepspeed_faults(config.engine.deepspeed)
    if steps and not faults and config.engine.deepspeed:
        with noted(faults):
            check_nested_keys(config, world)
    with noted(faults):
        facts = examine(config.model)
    if facts is not None:
        with noted(faults):
            facts.check_resolution(config.data.resolution)
        with noted(faults):
            check_objective(config, facts)
        if not config.model.from_scratch:
            parameters = count(weight_files(facts.folder, learned(facts.components), config.model.variant))
    with noted(faults):
        source = open_source(config.data)
        source.image(0)
    with noted(faults):
        check_folder(config, parameters or 0)
    if faults:
        raise joined(faults, f'the run "{config.name}"')
    assert facts is not None and source is not None, "a part is missing, yet nothing was found wrong"
    return Plan(config, world, accelerator, steps, facts, source, parameters)


@contextlib.contextmanager
def noted(faults: list[UserError]) -> Iterator[None]:
    """Write the user's mistakes down and go on."""
    try:
        yield
    except UserError as error:
        faults.append(error)


def joined(faults: Sequence[UserError], asked: str) -> UserError:
    """One error of several."""
    if len(faults) == 1:
        return faults[0]
    lines = [f"{fault.asked}: {fault.found}\n       -> {fault.do}" for fault in faults]
    return UserError(asked, "\n       ".join(lines), f"mend these {len(faults)}")


def check_precision(config: Config, accelerator: str) -> None:
    """Raise UserError for the cells of precision, stage and device that DeepSpeed cannot do right."""
    engine = config.engine
    if engine.precision == "fp16" and accelerator == "cpu":
        raise UserError(
            'engine.precision = "fp16"', "training on the CPU, which has none", 'set "bf16" or "fp32"'
        )
    if engine.precision == "fp16" and engine.zero_stage == 0:
        raise UserError(
            'engine.precision = "fp16" with engine.zero_stage = 0',
            "DeepSpeed gives no fp32 weights to average, save or export there",
            "set engine.zero_stage = 1, which costs nothing more",
        )


def deepspeed_faults(theirs: Mapping[str, Any]) -> list[UserError]:
    """Keys of [engine.deepspeed] that a setting of ours decides, or that DeepSpeed would ignore."""
    faults = []
    for key in theirs:
        if key not in DEEPSPEED_KEYS and key not in OWNED:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS - OWNED.keys(), 1)
            do = (
                f"did you mean {near[0]}?"
                if near
                else "remove it, or see DeepSpeed's configuration reference"
            )
            faults.append(UserError(f"[engine.deepspeed] {key}", "DeepSpeed does not know this key", do))
    for name, value in dotted(theirs):
        if name in OWNED:
            ours = OWNED[name]
            faults.append(
                UserError(
                    f"[engine.deepspeed] {name} = {value!r}", f"{ours} decides that", f"set {ours} instead"
                )
            )
    return faults


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested tables with their values, tables included."""
    for key, value in table.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")


def check_nested_keys(config: Config, world: int) -> None:
    """Let DeepSpeed's own models read the user's keys; what they refuse is a UserError."""
    # The import takes seconds, and few runs have such keys.
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = ds_config(config, world)
    # DeepSpeed would compare it with the ranks of a group that does not exist yet.
    del settings["train_batch_size"]
    try:
        DeepSpeedConfig(settings)
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        raise UserError(
            f"[engine.deepspeed] with the keys {', '.join(config.engine.deepspeed)}",
            f"DeepSpeed refuses them: {error}",
            "mend them as DeepSpeed's configuration reference says",
        ) from None


def check_objective(config: Config, facts: Facts) -> None:
    """Raise UserError for an objective that the weights' scheduler cannot have."""
    from sfumato.objective import Objective  # torch is needed for its tables

    Objective(config.objective, facts.scheduler)


def check_folder(config: Config, parameters: int) -> None:
    """Raise UserError unless the run's folder can be written to and has room for one checkpoint."""
    asked = f"the run's folder {config.folder}"
    place = config.folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(asked, f"{place} is not a folder", "set another `output` or `name`")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(asked, f"{place} cannot be written to", "set another `output`, or change its owner")
    needed, free = checkpoint_bytes(config, parameters), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            asked,
            f"a checkpoint takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "make room, or set `output` to a larger disk",
        )


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """The size of one checkpoint: fp32 weights, optimizer states and the average."""
    return parameters * 4 * (1 + STATES[config.optimizer.name] + config.ema.enabled)


def count(files: Sequence[Path]) -> int:
    """The numbers in safetensors files, read from their headers only."""
    total = 0
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total

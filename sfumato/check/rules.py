"""The rules of a run that need no data and no model; each raises a UserError."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sfumato.config import FASTEST, Config, Data
from sfumato.data.held import own_data
from sfumato.data.index import Index
from sfumato.data.sources.kinds import check_outside
from sfumato.engine.ds_config import SUB_GROUP
from sfumato.engine.offload import check_disk, host_memory
from sfumato.engine.profiles import kinds
from sfumato.engine.published import checkpoints_in, steps_in
from sfumato.engine.size import (
    BYTES,
    STATES,
    checkpoint_bytes,
    count,
    kept_at_once,
    readable,
    snapshot_bytes,
    snapshots,
)
from sfumato.errors import UserError
from sfumato.models.folder import Facts, learned, weight_files
from sfumato.tuning import has_bf16

IMAGES = ("images", "both")
"""Values of data.cache that encode images."""
LOOKED_AT = 1000
"""Records whose captions are read before a run."""


def check_sizes(config: Config, facts: Facts) -> None:
    """Raise UserError for a side that the VAE or the denoiser cannot take."""
    data = config.data
    if data.buckets is None:
        for side in data.resolutions:
            facts.check_resolution(side)
    elif data.buckets.sizes:
        for side in (side for size in data.buckets.sizes for side in size):
            facts.check_resolution(side, "data.buckets.sizes with the side")
    else:
        facts.check_resolution(data.buckets.step, "data.buckets.step")


def check_views(config: Config) -> None:
    """Raise UserError for a cache of what is drawn anew at each visit."""
    data = config.data
    if data.views is not None:
        return
    if data.cache in IMAGES and not data.center_crop:
        raise UserError(
            f'data.cache = "{data.cache}"',
            "crops are drawn anew at each visit, so that no encoded image could be used twice",
            "set data.center_crop = true, or data.views to the number of crops of an image to encode",
        )
    if data.cache in ("captions", "both") and (data.tags.shuffle or data.tags.dropout):
        raise UserError(
            f'data.cache = "{data.cache}" with [data.tags]',
            "tags are drawn anew at each visit, so that no encoded caption could be used twice",
            "set data.views to the number of captions of an image to encode",
        )


def check_method(config: Config, facts: Facts | None, index: Index | None) -> int | None:
    """How many numbers learn, where that is known. Raises UserError for what the method cannot do."""
    if facts is None:
        return None
    if config.method.kind == "full":
        if config.model.from_scratch:
            return None
        text = [part for part in facts.needs if config.learns_text and part.startswith("text_encoder")]
        parts = [learned(facts.components), *text]
        files = [weight_files(facts.folder, part, config.model.variant) for part in parts]
        return count([file for several in files for file in several])
    if index is None:
        return None
    from sfumato.methods import METHODS  # diffusers takes seconds, and Full has nothing to say

    return METHODS[config.method.kind].check(config, facts, some_captions(config.data, index))


def check_conditions(config: Config) -> None:
    """Raise UserError for a preview's second image that cannot be read."""
    if config.preview.conditions:
        from sfumato.drawing.inputs import read  # torch is needed

        for name in config.preview.conditions:
            read(Path(name).expanduser())


def some_captions(data: Data, index: Index) -> Iterator[str]:
    """The captions of a thousand records, spread over all, as their visits read them."""
    for number in range(0, len(index), -(-len(index) // LOOKED_AT)):
        for text in index.line(number)[2] if index.part[number] != index.prior else ():
            yield f"{data.caption_prefix}{text}{data.caption_suffix}"


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


def slow_numbers(config: Config, accelerator: str) -> str | None:
    """What a user should know of a precision that works, but slowly; None where there is nothing."""
    if accelerator != "cpu" or config.engine.precision != "bf16" or has_bf16():
        return None
    return "this CPU has no arithmetic for bf16: engine.precision=fp32 takes less time here"


def check_attention(config: Config, _: str) -> None:
    """Raise UserError for an attention backend that nobody knows; what works is tried where it trains."""
    asked = config.engine.attention
    if asked is None:
        return
    from sfumato.models.attention import backends, known  # diffusers takes a second

    names = [FASTEST, *sorted(known())]
    for name in backends(asked):
        if name not in names:
            do = f"take one of {', '.join(names)}; sfumato doctor tells which can train on a machine"
            raise UserError(f'engine.attention = "{name}"', "diffusers knows no such attention backend", do)
        if name == FASTEST and not isinstance(asked, str):
            do = 'set engine.attention = "fastest" for all of them'
            raise UserError(
                'engine.attention with "fastest" for one kind of layer', "it is for all or none", do
            )


def check_compile(config: Config, accelerator: str) -> None:
    """Raise UserError for engine.compile where blocks cannot be compiled."""
    if not config.engine.compile:
        return
    from sfumato.models.compiled import check_here  # torch is needed

    check_here("engine.compile = true", accelerator, config.engine.precision)


def check_objective(config: Config, facts: Facts) -> None:
    """Raise UserError for an objective that the weights' scheduler cannot have."""
    from sfumato.objective import Objective  # torch is needed for its tables

    Objective(config.objective, facts.scheduler)


def unlearned(config: Config, facts: Facts) -> str | None:
    """What a user should know of an objective that works, but leaves a timestep out; None if it does not."""
    rescaled = config.objective.zero_terminal_snr or facts.scheduler.get("rescale_betas_zero_snr")
    if config.objective.weight.kind != "min_snr" or not rescaled:
        return None
    return (
        'objective.weight="min_snr" counts the last timestep, which holds no signal, for nothing: '
        'with objective.weight="uniform" it is learned'
    )


def check_apart(config: Config) -> None:
    """Raise UserError where what a run draws would be found among the pictures that it reads."""
    data, asked = config.data, config.validation
    layouts = [*data.layouts, *(own_data(asked.source, data).layouts if asked and asked.source else ())]
    do = "set `output` to a folder outside, or move the pictures into a folder of their own"
    check_outside(config.folder, layouts, f"drawings in the run's folder {config.folder}", do)


def check_folder(config: Config, facts: Facts | None, parameters: int) -> None:
    """Raise UserError unless the run's folder can be written to and has room for its checkpoints."""
    asked = f"the run's folder {config.folder}"
    place = config.folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(asked, f"{place} is not a folder", "set another `output` or `name`")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(asked, f"{place} cannot be written to", "set another `output`, or change its owner")
    one, free = checkpoint_bytes(config, facts, parameters), shutil.disk_usage(place).free
    if one > free:
        found = f"a checkpoint takes {readable(one)}, and {readable(free)} are free"
        raise UserError(asked, found, "make room, or set `output` to a larger disk")
    count = max(0, kept_at_once(config) - len(checkpoints_in(config.folder)))
    copies = max(0, snapshots(config) - len(steps_in(config.folder / "averages")))
    needed = count * one + copies * snapshot_bytes(config, parameters)
    if needed > free:
        more = f"{count} more checkpoints" + (f" and {copies} more copies of averages" if copies else "")
        found = f"{more} take {readable(needed)}, and {readable(free)} are free"
        do = "make room, keep fewer ([checkpoint], ema.snapshots), or take another `output`"
        raise UserError(asked, found, do)


def check_host(config: Config, world: int, local: int, parameters: int) -> None:
    """Raise UserError where what offload moves here is more than this machine's memory or its disk.

    parameters: numbers that learn. local: ranks of `world` on this machine. Less is needed by no run: what
    waits on its way, and what the processes themselves take, comes on top.
    """
    engine = config.engine
    moved = 4 * (1 + len(STATES[config.optimizer.name]) + len(kinds(config.ema)))
    one = moved * (engine.offload_optimizer == "cpu")
    one += BYTES[engine.precision] * (engine.offload_parameters != "none")
    needed, there = one * parameters * local // world, host_memory()
    if needed > there:
        raise UserError(
            "what engine.offload_optimizer and engine.offload_parameters move to this machine's memory",
            f"it takes at least {readable(needed)} for {local} rank{'s' * (local > 1)}, and the machine has "
            f"{readable(there)}",
            "offload less, or take a machine with more memory or more machines; `sfumato plan` with "
            f"--host-memory {there / 1e9:.0f} says what fits",
        )
    if engine.offload_optimizer == "nvme" and engine.nvme_path is not None:
        theirs = engine.deepspeed.get("zero_optimization", {})
        group = min(theirs.get("sub_group_size", SUB_GROUP), parameters // world)
        # All of it, and a copy for a checkpoint.
        check_disk(config, 2 * moved * parameters * local // world, group)

"""What validation and previews cost, before a run."""

from collections.abc import Iterator

from sfumato.config import Config
from sfumato.data.held import Held
from sfumato.engine.profiles import kinds


def looks(config: Config, held: Held | None, world: int) -> Iterator[tuple[str, str]]:
    """What validation and previews cost."""
    if config.validation is not None and held is not None:
        asked, averages = config.validation, len(kinds(config.ema))
        conditions = 3 if config.method.kind == "controlnet" else 2
        passes = -(-len(held.groups(asked.quantiles, config.micro_batch_size)) // world)
        passes *= conditions * (1 + averages)
        times = turns(config.steps, asked.every)
        samples = len(held.numbers) * asked.quantiles * conditions * (1 + averages)
        # A backward pass takes twice the arithmetic of its forward pass.
        share = times * samples / (3 * config.steps * config.batch_size)
        where = "held out" if held.out_of is not None else f"of {asked.source}"
        yield "validate", f"{len(held.numbers):,} records {where}, at {asked.quantiles} noise levels"
        yield (
            "",
            f"{times:,} times {passes:,} forward passes on each rank: {share:.1%} of training's arithmetic",
        )
    if prompts := len(config.preview.prompts):
        passes = -(-prompts // world) * config.preview.steps
        times = turns(config.steps, config.preview.every)
        yield "previews", f"{prompts:,}, {times:,} times {passes:,} forward passes on each rank"


def turns(steps: int, every: int) -> int:
    """How often something happens at step 0, every so many steps and after the last one."""
    return -(-steps // every) + 1

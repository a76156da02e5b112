"""What a run and a cache begin with: the ranks, the plan that they share, and the model's family."""

import os
from typing import Any

import torch.distributed as dist

from sfumato import models, prior
from sfumato.check import Plan, check, slow_numbers, unlearned
from sfumato.config import FASTEST, Config
from sfumato.engine import ranks
from sfumato.engine.checkpoint import Saved
from sfumato.engine.offload import host_memory
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.models.attention import Kernels, try_kernels
from sfumato.models.family import Family
from sfumato.models.fastest import bare, fastest
from sfumato.models.loading import DTYPES, frozen_dtypes, held_parts
from sfumato.prior.fill import fill
from sfumato.run import together
from sfumato.watch import MARGIN


def begin(config: Config, planned: bool = False) -> tuple[Ranks, Plan]:
    """This process's place, and what the run will do, after the class images that it needs are drawn.

    planned: choose what `engine = "auto"` leaves open; the plan's config has it. The first rank looks at the
    data, and makes their index if need be, before the others open it.
    """
    # Who hangs is named by the watch; the group's own error names nobody, so it comes later.
    place = ranks.start(config.engine.timeout + MARGIN)
    if planned and config.engine.auto:
        config = with_choice(config, place)
    if prior.drawn(config):
        config = with_class_images(config, place)
    if not place.first:
        place.barrier()
    local = ranks_here(place)
    plan = check(config, place.world, place.device.type, verify=place.first, tell=print, local=local)
    if place.first:
        place.barrier()
        for advice in (slow_numbers(config, place.device.type), unlearned(config, plan.facts)):
            if advice:
                print(advice)
    return place, plan


def ranks_here(place: Ranks) -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", place.world))


def with_choice(config: Config, place: Ranks) -> Config:
    """The config with the planner's choice for the smallest device of all; the first rank chooses."""
    from sfumato.planner import auto

    local = ranks_here(place)
    memory, called = min(place.gathered(auto.room(local)))
    host = min(place.gathered(host_memory()))
    found: list[Any] = [None]
    if place.first:
        try:
            found = [auto.decide(config, place.world, local, memory, called, host, print)]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return auto.chosen(config, found[0])


def settled(config: Config, plan: Plan) -> Config:
    """The config with what the plan chose of the engine: for `engine = "auto"`, and for a stage left open."""
    said = {"engine": plan.config.engine, "micro_batch_size": plan.config.micro_batch_size}
    return config.model_copy(update=said)


def with_class_images(config: Config, place: Ranks) -> Config:
    """The config with the prior's pictures as its source; all ranks together draw those that are missing.

    The first rank looks at everything else before, so that what can be refused is refused.
    """
    found: list[Any] = [None, None]
    if place.first:
        plan = check(config, place.world, place.device.type, tell=print, local=ranks_here(place))
        assert plan.pictures is not None, "the plan knows of no class images"
        plan.pictures.note(config.folder)
        found = [plan.pictures, plan.missing]
    dist.broadcast_object_list(found)
    pictures, missing = found
    fill(config, pictures, missing, place, *frozen_dtypes(config))
    return pictures.given(config)


def load_family(config: Config, place: Ranks) -> Family:
    """The model's family, with the frozen parts that encode while training."""
    return models.load(config.model, place.device, *frozen_dtypes(config), *held_parts(config))


def with_kernels(config: Config, plan: Plan, place: Ranks, saved: Saved | None) -> Config:
    """The config with attention kernels that can train here: those it names, or the fastest ones.

    Which are the fastest is a matter of timing, and each rounds in its own way: a run that goes on keeps what
    it chose at its start, where that still works. The first rank chooses for all; each tries what was chosen.
    """
    asked, dtype = config.engine.attention, DTYPES[config.engine.precision]
    if asked is None:
        return config
    net = bare(plan.facts)

    def tried(kernels: Kernels) -> Kernels:
        together(place, lambda: try_kernels(kernels, net, place.device, dtype))
        return kernels

    if asked != FASTEST:
        tried(asked)
        return config
    before = None if saved is None else saved.state["config"]["engine"].get("attention")
    if isinstance(before, dict):
        try:
            return with_attention(config, tried(before))
        except UserError as error:
            if place.first:
                print(
                    f"{error.asked}, as the run had it: {error.found}; it chooses anew, which moves last bits"
                )
    sizes = plan.cells.sizes
    found = together(
        place, lambda: fastest(config, plan.facts, sizes, place.device) if place.first else None
    )[0]
    if place.first:
        print(found)
    return with_attention(config, tried(found.kernels))


def with_attention(config: Config, kernels: Kernels) -> Config:
    """The config with these attention kernels."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"attention": kernels})})

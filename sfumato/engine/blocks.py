"""Stage 3 by blocks: the weights of a block come and go together.

DeepSpeed 0.19.8 hangs four hooks on every module, on those without weights, too. SDXL has 1,930 modules, and
a hook costs the host a tenth of a millisecond and more, so that a card waits for its host. With its repeated
blocks taken as one (DeepSpeed's "leaf modules") 190 are left, each with one exchange.

DeepSpeed's way with such a block's gradients is left out: it takes them all once the gradient of the block's
input is there, and where the input has none, as in a LoRA's first block, before there is any. Here each
parameter gives its own as soon as it is there, as it does without blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.runtime.zero import stage3
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from sfumato.engine.gradients import TESTED
from sfumato.models.compiled import WHOLE


@contextmanager
def as_one(module: nn.Module) -> Iterator[None]:
    """Within it DeepSpeed is given a module for stage 3; in a release that was not tested nothing happens."""
    if deepspeed.__version__.partition("+")[0] not in TESTED:
        yield
        return
    set_z3_leaf_modules(module, [*WHOLE], raise_if_not_found=False)
    asks, stage3.z3_leaf_parameter = stage3.z3_leaf_parameter, by_itself
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = asks


def by_itself(parameter: Any) -> bool:
    """In place of DeepSpeed's question whether a parameter's gradient waits for those of its block."""
    return False

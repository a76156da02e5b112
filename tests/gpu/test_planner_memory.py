"""The planner's memory against what a GPU really gives out, at a size that outweighs kernels' buffers."""

from typing import Any

import pytest
from torch import Tensor

from tests.unit import twins
from tests.unit.measured import Step
from tests.unit.test_planner_trace import LORA, config, mid, planned

pytestmark = pytest.mark.gpu
__all__ = ["mid"]
SIZE, SAMPLES = (512, 512), 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"engine__zero_stage": 0}, {"method": LORA}], ids=str)
def test_weights_gradients_and_trace_are_the_peak(
    mid: Any, changes: dict[str, Any], checkpointing: bool
) -> None:
    """Plain torch on one GPU: what the planner says of a step, and the weights and gradients beside it."""
    import torch
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    scratch = "method" not in changes  # LoRA learns beside weights, of which the larger model has none
    where = mid if scratch else twins.twin("sd")
    settings = config(
        str(where),
        model__from_scratch=scratch,
        engine__precision="bf16",
        engine__gradient_checkpointing=checkpointing,
        **changes,
    )
    step = Step(settings, torch.device(device.device_name()))
    # The first time a GPU's libraries take room for themselves.
    for _ in range(2):
        step.parts.zero_grad(set_to_none=True)
        batch = step.batch(SIZE, SAMPLES)
        before = device.memory_allocated()
        told = (*vars(batch).values(), *vars(batch.draws).values())
        given = sum(t.nbytes for t in told if isinstance(t, Tensor))
        device.reset_peak_memory_stats()
        latents, condition = step.method.encode(batch)
        losses = step.losses(latents, condition, batch)
        del latents, condition, batch, told  # as in the loop
        losses.sum().backward()
        taken = device.max_memory_allocated() - before + given
    gradients = sum(p.grad.nbytes for p in step.parts.parameters() if p.grad is not None)
    foretold = planned(settings, SIZE).step_peak(SAMPLES)
    # At the peak some gradients are there and others are not yet.
    assert foretold * 0.9 < taken < (foretold + gradients) * 1.1

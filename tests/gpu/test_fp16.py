"""fp16 and loss scaling on one GPU: DeepSpeed refuses fp16 on CPUs."""

import pytest

from tests.engine import toys
from tests.engine.ranks import run_ranks
from tests.engine.test_numbers import check_gradient, moved, plain_gradient

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("micro", [8, 2])
def test_t17_gradient_is_that_of_fp32_to_half_precision(stage: int, micro: int) -> None:
    import torch

    settings = toys.config(engine__zero_stage=stage, engine__precision="fp16", micro_batch_size=micro)
    results = run_ranks(toys.run, 1, settings, 1, init=False)
    check_gradient(moved(results), plain_gradient(torch.float32)[0], 5e-3)


def test_an_overflow_is_tried_again_and_the_step_is_not_lost() -> None:
    """The largest scale overflows at once; the same batch is repeated with smaller ones until it fits."""
    settings = toys.config(
        engine__precision="fp16",
        micro_batch_size=8,
        engine__fp16={"initial_scale_power": 32, "hysteresis": 1},
    )
    assert run_ranks(toys.steps_despite_overflow, 1, settings, 2, init=False) == [2]

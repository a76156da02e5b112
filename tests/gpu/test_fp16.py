"""fp16 and loss scaling on one GPU: DeepSpeed refuses fp16 on CPUs."""

from pathlib import Path

import pytest

from tests.engine import toys
from tests.engine.ranks import run_ranks
from tests.engine.test_bad_numbers import despite_overflow
from tests.engine.test_numbers import check_gradient, moved, plain_gradient

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("micro", [8, 2])
def test_t17_gradient_is_that_of_fp32_to_half_precision(stage: int, micro: int) -> None:
    import torch

    settings = toys.config(engine__zero_stage=stage, engine__precision="fp16", micro_batch_size=micro)
    results = run_ranks(toys.run, 1, settings, 1, init=False)
    check_gradient(moved(results), plain_gradient(torch.float32)[0], 5e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_is_tried_again_and_a_bad_loss_leaves_no_trace(stage: int, tmp_path: Path) -> None:
    """The largest scale overflows at once; the same batch is repeated with smaller ones until it fits."""
    settings = toys.config(
        engine__zero_stage=stage,
        engine__precision="fp16",
        engine__fp16={"initial_scale_power": 32, "hysteresis": 1},
        micro_batch_size=2,
        output=str(tmp_path),
        bad_numbers__policy="skip",
    )
    [(steps, position, overflows, before, after)] = run_ranks(despite_overflow, 1, settings, 2, init=False)
    assert (steps, position) == (2, 3) and overflows > 0
    assert before == after < 2**32, "the bad loss made the scale smaller"

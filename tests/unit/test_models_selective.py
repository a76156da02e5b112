"""gradient_checkpointing = "selective": no arithmetic is done twice, and less is held than without."""

from typing import Any

import pytest
import torch

from sfumato.models import denoiser
from sfumato.planner.architectures import facts_of
from sfumato.planner.trace import Stage, Taken, fullest, rehearse
from tests.unit.measured import CPU, Step, peak
from tests.unit.test_planner_trace import twin

SIZE = (256, 256)


def taken(checkpointing: Any) -> Taken:
    """What a step takes, without numbers."""
    settings = twin("sd", data__conditioning_column=None, engine__gradient_checkpointing=checkpointing)
    return rehearse(Stage(settings, facts_of(settings.model)), SIZE)


def check_selective(found: Taken, none: Taken, all_of_it: Taken) -> None:
    """Fail unless next to nothing is computed twice, and what is held at once is between the other two."""
    assert none.flops.of(2) <= found.flops.of(2) <= 1.02 * none.flops.of(2) < all_of_it.flops.of(2), "FLOPs"
    least, held, most = (fullest(each.peaks, 2) for each in (all_of_it, found, none))
    assert least < held < 0.8 * most, "bytes"


def test_selective_computes_nothing_dear_twice_and_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    found, none, all_of_it = (taken(each) for each in ("selective", False, True))
    check_selective(found, none, all_of_it)
    settings = twin("sd", data__conditioning_column=None, engine__gradient_checkpointing="selective")
    real = peak(Step(settings, CPU), SIZE, 2)  # of the allocator
    assert abs(fullest(found.peaks, 2) / real - 1) < 0.1
    for dear, what in (([], "FLOPs"), ([*denoiser.DEAR, torch.ops.aten.silu.default], "bytes")):
        if what == "bytes":
            dear += [getattr(torch.ops.aten, name).default for name in ("gelu", "native_layer_norm", "t")]
            dear += [
                torch.ops.aten.native_group_norm.default,
                torch.ops.aten.mul.Tensor,
                torch.ops.aten.add.Tensor,
            ]
        with monkeypatch.context() as broken, pytest.raises(AssertionError, match=what):
            broken.setattr(denoiser, "DEAR", dear)
            check_selective(taken("selective"), none, all_of_it)

"""Stage 3 with blocks as one: what DeepSpeed computes layer by layer."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import stage3
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from sfumato.bench.gates.paper import replaced
from sfumato.engine import blocks
from sfumato.engine.engine import Engine
from sfumato.models.compiled import WHOLE
from tests.engine import runs
from tests.engine.ranks import run_ranks

RUN: dict[str, Any] = {"steps": 2, "micro_batch_size": 4, "ema__enabled": False, "engine__zero_stage": 3}
CELLS: dict[str, dict[str, Any]] = {
    # Blocks are computed again in the backward pass.
    "full": {"method": {"kind": "full", "text_encoders": True}, "engine__gradient_checkpointing": True},
    # The input of its first block has no gradient.
    "lora": {"method": {"kind": "lora", "rank": 2}},
}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def run(place: str, cell: str, name: str, hooks: list[int]) -> dict[str, Tensor]:
    """Two steps at stage 3; every number that was saved."""
    changes = RUN | CELLS[cell]
    start = Engine._start

    def started(self: Engine, *told: Any) -> None:
        start(self, *told)
        hooks.append(len(self.deepspeed.optimizer.parameter_offload.forward_hooks))

    with replaced(Engine, "_start", started):
        folder = runs.train_here(runs.settings(Path(place), name=f"{cell}-{name}", **changes)).parent
    return {f"{kind}/{key}": value for kind in KINDS for key, value in runs.tensors_of(folder, kind).items()}


@contextmanager
def gradients_with_the_block(module: nn.Module) -> Any:
    """Broken: DeepSpeed's own way."""
    set_z3_leaf_modules(module, [*WHOLE], raise_if_not_found=False)
    assert stage3.z3_leaf_parameter is not blocks.by_itself
    yield


def found(place: str) -> dict[str, Any]:
    """All that a rank does, in one start."""
    runs.without_exports()
    told: dict[str, Any] = {"ours": {}, "theirs": {}, "hooks": {}, "broken": ""}
    for cell in CELLS:
        hooks: list[int] = []
        told["ours"][cell] = run(place, cell, "ours", hooks)
        with replaced(blocks, "as_one", lambda module: nullcontext()):
            told["theirs"][cell] = run(place, cell, "theirs", hooks)
        told["hooks"][cell] = hooks
    with replaced(blocks, "as_one", gradients_with_the_block):
        try:
            run(place, "lora", "broken", [])
        except RuntimeError as error:
            told["broken"] = str(error)
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = runs.write_place(tmp_path_factory.mktemp("blocks"), "sd")
    return run_ranks(found, 1, str(place), timeout=280)[0]


@pytest.mark.parametrize("cell", CELLS)
def test_weights_and_states_are_deepspeeds_own(told: dict[str, Any], cell: str) -> None:
    ours, theirs = told["ours"][cell], told["theirs"][cell]
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        # What meets at a layer's input is summed in another order.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_a_block_is_hung_with_the_hooks_of_one_module(told: dict[str, Any], cell: str) -> None:
    few, many = told["hooks"][cell]
    assert few < many / 2


def test_catches_gradients_that_wait_for_the_block(told: dict[str, Any]) -> None:
    assert "size of tensor" in told["broken"], "it is silent: compare its numbers"


def test_in_another_release_nothing_happens() -> None:
    with replaced(blocks, "TESTED", ()), blocks.as_one(nn.Linear(2, 2)):
        assert stage3.z3_leaf_parameter is not blocks.by_itself

"""Full training trains the denoiser, and the text encoders if asked, from files or from random numbers."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from sfumato import config, methods, models
from sfumato.config import Config
from sfumato.data.batch import Batch, Draws
from sfumato.engine.ranks import Ranks
from sfumato.engine.weights import WeightFiles, starting
from sfumato.methods import METHODS, Method
from sfumato.methods.full import Full
from sfumato.models.parts import Parts
from sfumato.planner import costs
from sfumato.report import card
from tests.unit import twins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / "sd"
    twins.write("sd", path)
    return path


def full(folder: Path, from_scratch: bool = False) -> Method:
    model = {"weights": str(folder), "from_scratch": from_scratch}
    settings = config.parse({"steps": 1, "batch_size": 1, "model": model, "data": {"source": "none"}})
    family = models.load(settings.model, torch.device("cpu"), torch.float32, torch.float32)
    return methods.build(settings, family)


def check_whole_denoiser(method: Method) -> None:
    """Every weight of the denoiser's file has its place in the trained module, and each of them learns."""
    net = method.build()
    states = {
        f"{part}.{name}": tensor
        for part, files in method.weights().items()
        for path in files
        for name, tensor in load_file(path).items()
    }
    assert states.keys() == net.state_dict().keys(), "the files and the module differ"
    assert all(weight.requires_grad for weight in net.parameters()), "a weight does not learn"


def test_every_weight_learns(folder: Path) -> None:
    check_whole_denoiser(full(folder))


def test_every_weight_learns_catches_a_frozen_one(folder: Path) -> None:
    class Broken(Full):
        def build(self) -> Parts:
            parts = super().build()
            parts.get_submodule("unet.conv_in").requires_grad_(False)
            return parts

    method = full(folder)
    assert isinstance(method, Full)
    with pytest.raises(AssertionError, match="does not learn"):
        check_whole_denoiser(Broken(method.family, method.config))


def test_from_scratch_has_no_files(folder: Path) -> None:
    method = full(folder, from_scratch=True)
    assert method.weights() == {}
    drawn, again, other = method.draw(3), method.draw(3), method.draw(4)
    assert drawn.keys() == method.build().state_dict().keys()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["unet.conv_in.weight"], other["unet.conv_in.weight"])
    assert full(folder).draw(3) == {}


def test_the_parts_answer_as_the_denoiser_does(folder: Path) -> None:
    method = full(folder)
    parts = method.build()
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    condition = method.family.encode_prompts(["a red fox", "two cats"])
    with torch.no_grad():
        net: Any = parts["unet"]
        assert torch.equal(parts(x_t, t, condition), net(x_t, t, condition["context"]).sample)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Method:
    """A method whose text encoders learn, with weights of a toy."""
    path: Path = tmp_path_factory.mktemp("live") / request.param
    twins.write(request.param, path)
    return learning(path)


def learning(path: Path) -> Method:
    values = {"steps": 1, "batch_size": 1, "model": {"weights": str(path)}, "data": {"source": "none"}}
    settings = config.parse(values | {"method": {"kind": "full", "text_encoders": True}})
    return methods.build(settings, models.load(settings.model, *[torch.device("cpu")], *[torch.float32] * 2))


def filled(method: Method) -> Parts:
    parts = method.build()
    files = WeightFiles(method.weights())
    files.check(parts)
    with torch.no_grad():
        for name, p in parts.named_parameters():
            p.copy_(files(name, 0, p.numel()).view(p.shape))
    return parts


def batch_of(captions: list[str], dropped: list[bool]) -> Batch:
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(captions))
    noise = torch.zeros(len(captions), 4, 8, 8)
    drawn = Draws(noise, noise, torch.zeros(len(captions)), noise[:, :, :1, :1], None)
    ids = torch.arange(len(captions))
    return Batch(ids, ids * 0, captions, torch.tensor(dropped), size, drawn, moments=noise)


CAPTIONS = ["a red fox", "", "two cats"]


def check_conditions(method: Method, parts: Parts, dropped: list[bool]) -> None:
    """What encoders in the trained module say is what the frozen ones say, null rows too."""
    batch = batch_of(CAPTIONS, dropped)
    expected = method.family.condition(batch)
    found = method.family.read_batch(parts.only(method.text), method.encode(batch)[1])
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropped", [[False] * 3, [True, False, True]])
def test_text_encoders_that_learn_say_what_frozen_ones_say(live: Method, dropped: list[bool]) -> None:
    check_conditions(live, filled(live), dropped)


def test_the_check_catches_other_weights(live: Method) -> None:
    with pytest.raises(AssertionError):
        check_conditions(live, live.build(), [False] * 3)


def test_all_of_the_text_encoders_that_the_answer_depends_on_learns(live: Method) -> None:
    """Gradients reach every weight that is to learn; weight decay would eat one that is never read."""
    parts = filled(live)
    latents, condition = live.encode(batch_of(CAPTIONS, [False, False, True]))
    parts(latents + 1, torch.tensor([3.0, 500.0, 900.0]), condition).square().mean().backward()
    for name, p in parts.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    frozen = [name for name, p in parts.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (len(live.text) == 2), "SDXL does not read the first encoder's last layer"
    assert all(name.startswith("text_encoder.") for name in frozen)


def test_a_kind_is_known_wherever_kinds_count() -> None:
    """A method that is missing on one of them would be found out at the end of its first run."""
    union = get_args(Config.model_fields["method"].annotation)
    said = {get_args(kind.model_fields["kind"].annotation)[0] for kind in union}
    assert said == set(METHODS) == set(card.KINDS) == set(costs.LAUNCHED)


def test_numbers_of_another_origin_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of a file that is damaged; else a run that is started again has those of its first start."""
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)  # there is no group
    drawn: list[int] = []

    def draw() -> dict[str, torch.Tensor]:
        drawn.append(0)
        return {"a": torch.full((2,), float(len(drawn)))}

    def first(origin: str) -> float:
        weights = starting({}, draw, str, tmp_path, Ranks(0, 1, torch.device("cpu")), origin)
        return float(weights("a", 0, 2)[0])

    assert [first("one"), first("one"), first("two"), first("two")] == [1, 1, 2, 2]
    file = tmp_path / "random.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    assert first("two") == 3


def test_the_origin_is_all_that_is_drawn_from(folder: Path) -> None:
    method = full(folder, from_scratch=True)
    before = method.origin()
    assert full(folder, from_scratch=True).origin() == before
    method.config = method.config.model_copy(update={"seed": 1})
    assert method.origin() != before

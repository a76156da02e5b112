"""Full training trains the family's denoiser, from its files or from random numbers."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sfumato import config, methods, models
from sfumato.methods import Full, Method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / "sd"
    models.family_class("sd").tiny(path)
    return path


def full(folder: Path, from_scratch: bool = False) -> Method:
    model = {"weights": str(folder), "from_scratch": from_scratch}
    settings = config.parse({"steps": 1, "batch_size": 1, "model": model, "data": {"source": "none"}})
    family = models.load(settings.model, torch.device("cpu"), torch.float32, torch.float32)
    return methods.build(settings, family)


def check_whole_denoiser(method: Method) -> None:
    """Every weight of the denoiser's file has its place in the trained module, and each of them learns."""
    net = method.build()
    states: dict[str, torch.Tensor] = {}
    for path in method.weights():
        states |= load_file(path)
    assert states.keys() == net.state_dict().keys(), "the files and the module differ"
    assert all(weight.requires_grad for weight in net.parameters()), "a weight does not learn"


def test_every_weight_learns(folder: Path) -> None:
    check_whole_denoiser(full(folder))


def test_every_weight_learns_catches_a_frozen_one(folder: Path) -> None:
    class Broken(Full):
        def build(self) -> torch.nn.Module:
            net = super().build()
            net.get_submodule("conv_in").requires_grad_(False)
            return net

    method = full(folder)
    assert isinstance(method, Full)
    with pytest.raises(AssertionError, match="does not learn"):
        check_whole_denoiser(Broken(method.family, method.config))


def test_from_scratch_has_no_files(folder: Path) -> None:
    method = full(folder, from_scratch=True)
    assert method.weights() == []
    drawn, again, other = method.draw(3), method.draw(3), method.draw(4)
    assert drawn.keys() == method.build().state_dict().keys()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not torch.equal(drawn["conv_in.weight"], other["conv_in.weight"])
    assert full(folder).draw(3) == {}


def test_predict_is_the_denoisers_answer(folder: Path) -> None:
    method = full(folder)
    assert isinstance(method, Full)
    net = method.build()
    assert isinstance(net, UNet2DConditionModel)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    condition = method.family.encode_prompts(["a red fox", "two cats"])
    with torch.no_grad():
        wanted = net(x_t, t, condition["context"]).sample
        assert torch.equal(method.predict(net, x_t, t, condition), wanted)

"""Every fault of a weights folder is a UserError that says what was asked, what was found and what to do."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.config import Model
from sfumato.errors import UserError
from sfumato.models import families
from sfumato.models.folder import examine, locate, read_facts, weight_files
from sfumato.models.hub import download, patterns
from sfumato.models.loading import tokenizer
from tests.unit.twins import change, copy, load, twin

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_facts_of_the_twins() -> None:
    for name, pipeline in (("sd", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")):
        facts = examine(Model(weights=str(twin(name))))
        assert (facts.family, facts.pipeline) == (name, pipeline)
        assert (facts.latent_channels, facts.vae_factor, facts.granularity) == (4, 8, 16)
        assert facts.prediction_type == "epsilon" and facts.scheduler["beta_schedule"] == "scaled_linear"
        assert facts.denoiser["block_out_channels"] == [32, 64]
        assert set(facts.needs) < set(facts.components)
    assert families() == ["sd", "sdxl"]


def spoil_json(path: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / path, lambda found: found.update(values))


def remove(path: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return work


def write(path: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_text(content) and None


def drop(part: str) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model_index.json", lambda found: found.pop(part))


FAULTS = [
    ("sd", remove("model_index.json"), "no model_index.json in it; it holds"),
    ("sd", write("model_index.json", "{"), "cannot be read"),
    ("sd", write("model_index.json", "[1]"), "holds a list, not a table"),
    (
        "sd",
        spoil_json("model_index.json", _class_name="FluxPipeline"),
        r"sd \(StableDiffusionPipeline\), sdxl",
    ),
    ("sdxl", spoil_json("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"), "Img2Img"),
    ("sd", remove("unet"), "unet/config.json"),
    ("sd", remove("unet/config.json"), "holds diffusion_pytorch_model.safetensors"),
    ("sd", remove(UNET), "no such file"),
    ("sd", remove("vae"), "vae/config.json"),
    ("sd", remove("vae/diffusion_pytorch_model.safetensors"), "no such file"),
    ("sd", remove("scheduler"), "scheduler_config.json"),
    ("sd", remove("text_encoder"), "no text_encoder"),
    ("sdxl", remove("text_encoder_2"), "no text_encoder_2"),
    ("sdxl", remove("text_encoder_2/model.safetensors"), "text_encoder_2/model.safetensors"),
    ("sd", remove("tokenizer"), "no tokenizer"),
    ("sdxl", drop("tokenizer_2"), "no tokenizer_2"),
    ("sdxl", spoil_json("model_index.json", text_encoder=[None, None]), "no text_encoder"),
    ("sd", drop("unet"), "no unet"),
    ("sd", drop("scheduler"), "no scheduler"),
    ("sd", spoil_json("unet/config.json", in_channels=9), "inpainting"),
    ("sd", spoil_json("vae/config.json", latent_channels=16), "takes 4 channels and the VAE gives 16"),
    ("sd", spoil_json("vae/config.json", _class_name="AutoencoderTiny"), "AutoencoderTiny"),
    ("sd", spoil_json("scheduler/scheduler_config.json", prediction_type="flow"), "predicts 'flow'"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), FAULTS)
def test_a_faulty_folder_is_refused_without_loading(
    name: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = copy(name, tmp_path)
    assert examine(Model(weights=str(folder))).family == name
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        examine(Model(weights=str(folder)))
    assert str(folder) in str(error.value) and error.value.do


def lose_a_weight(path: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        tensors = load_file(folder / path)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, folder / path, {"format": "pt"})

    return work


def cut(path: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / path, 1000)


def add_copy(folder: Path) -> None:
    """Write tokenizer.json too, as transformers does."""
    tokenizer(folder).save_pretrained(folder)


LOADING_FAULTS = [
    ("sd", lose_a_weight("vae/diffusion_pytorch_model.safetensors"), "lacks 1 of the weights"),
    ("sd", lose_a_weight("text_encoder/model.safetensors"), "lacks 1 of the weights"),
    ("sdxl", lose_a_weight("text_encoder_2/model.safetensors"), "lacks 1 of the weights"),
    ("sd", cut("vae/diffusion_pytorch_model.safetensors"), "AutoencoderKL in"),
    ("sd", cut("text_encoder/model.safetensors"), "CLIPTextModel in"),
    ("sd", write("text_encoder/model.safetensors", "<html>not found</html>"), "CLIPTextModel in"),
    ("sd", spoil_json("vae/config.json", block_out_channels=[8, 8, 16, 32]), "AutoencoderKL in"),
    ("sd", spoil_json("text_encoder/config.json", hidden_size=64), "CLIPTextModel in"),
    ("sd", remove("text_encoder/config.json"), "CLIPTextModel in"),
    ("sd", lambda folder: add_copy(folder / "tokenizer"), None),
    ("sd", write("tokenizer/tokenizer.json", "{"), "tokenizer in"),
    ("sd", write("tokenizer/tokenizer_config.json", "{}"), "how many tokens"),
    ("sd", spoil_json("unet/config.json", cross_attention_dim=48), "width 48, the text encoders give 32"),
    ("sdxl", spoil_json("unet/config.json", projection_class_embeddings_input_dim=10), "width 10"),
    ("sd", spoil_json("model_index.json", unet=["diffusers", "UNet2DModel"]), "UNet2DModel"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), LOADING_FAULTS)
def test_a_part_that_cannot_be_loaded(
    name: str,
    spoil: Callable[[Path], None],
    message: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = copy(name, tmp_path)
    spoil(folder)
    if message is None:
        load(folder)
    else:
        with pytest.raises(UserError, match=message) as error:
            load(folder)
        assert str(folder) in str(error.value)
    assert capfd.readouterr() == ("", "")


WORDS = [[], ["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"], ["tokenizer.json"]]


@pytest.mark.parametrize("kept", WORDS)
def test_a_tokenizer_without_words_is_refused(kept: list[str], tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    add_copy(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        if file.name not in ("tokenizer_config.json", *kept):
            file.unlink()
    if kept in (["vocab.json", "merges.txt"], ["tokenizer.json"]):
        right = load(twin("sd")).encode_prompts(["a cat", ""])
        assert torch.equal(load(folder).encode_prompts(["a cat", ""])["context"], right["context"])
        return
    with pytest.raises(UserError, match="neither tokenizer.json nor vocab.json"):
        examine(Model(weights=str(folder)))


def test_the_wrong_family_and_no_family() -> None:
    with pytest.raises(UserError, match='set it to "sdxl"'):
        load(twin("sdxl"), family="sd")
    with pytest.raises(UserError, match="families: sd, sdxl"):
        load(twin("sd"), family="flux")
    assert load(twin("sd"), family="sd").facts.family == "sd"


@pytest.mark.parametrize(
    ("resolution", "do"), [(520, "512 or 528"), (8, "choose 16"), (1023, "1008 or 1024")]
)
def test_resolutions(resolution: int, do: str) -> None:
    facts = examine(Model(weights=str(twin("sd"))))
    facts.check_resolution(512)
    with pytest.raises(UserError, match=f"{do}$") as error:
        facts.check_resolution(resolution)
    assert "divides the side by 8, its denoiser by 2" in error.value.found


# Files.


def test_variants_are_found_and_missed_clearly(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(UserError, match="set model.variant"):
        weight_files(folder, "unet")
    assert [file.name for file in weight_files(folder, "unet", "fp16")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    with pytest.raises(UserError, match=r"remove model\.variant"):
        weight_files(folder, "text_encoder", "fp16")


def test_a_variant_is_loaded_whole(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    for file in (*folder.glob("*/*model.safetensors"),):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    found = load(folder, variant="fp16").encode_prompts(["a cat"])["context"]
    assert torch.equal(found, load(twin("sd")).encode_prompts(["a cat"])["context"])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_and_transformers_write_them(variant: str | None, tmp_path: Path) -> None:
    part = load(twin("sd"))
    part.build_denoiser().save_pretrained(tmp_path / "unet", max_shard_size="1MB", variant=variant)
    encoder = part.text_encoders["text_encoder"]
    encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="1MB", variant=variant)
    for component, whole in (("unet", part.build_denoiser()), ("text_encoder", encoder)):
        files = weight_files(tmp_path, component, variant)
        assert len(files) > 1
        names = [name for file in files for name in load_file(file)]
        assert sorted(names) == sorted(whole.state_dict())
    files[0].unlink()
    with pytest.raises(UserError, match="not there: model"):
        weight_files(tmp_path, "text_encoder", variant)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="secret"):
        weight_files(tmp_path, "unet")


class Bomb:
    """A pickle that runs code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/pytorch_model"])
def test_nothing_of_the_folder_is_executed(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = copy("sd", tmp_path), tmp_path / "executed"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Custom: pass\n"
    for place in (folder, folder / "text_encoder", folder / "tokenizer", folder / "unet", folder / "vae"):
        (place / "custom.py").write_text(code)
    remote = {
        "AutoModel": "custom.Custom",
        "AutoTokenizer": ["custom.Custom", None],
        "AutoConfig": "custom.Custom",
    }
    for file in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        change(folder / file, lambda values: values.update(auto_map=remote))
    monkeypatch.chdir(folder)
    family = load(folder)
    family.assemble(family.build_denoiser())
    with (folder / f"{part}.bin").open("wb") as file:
        pickle.dump(Bomb(mark), file)
    next((folder / part).parent.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="pickled weights"):
        load(folder)
    assert not mark.exists()


def test_a_scheduler_that_diffusers_does_not_have(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    for library, name in (("diffusers", "UNet2DModel"), ("os", "system"), ("diffusers", "NewScheduler")):
        change(
            folder / "model_index.json",
            lambda found, pair=(library, name): found.update(scheduler=list(pair)),
        )
        with pytest.raises(UserError, match=f"{library}.{name}"):
            load(folder)


# Places.


def test_local_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(twin("sd"))) == twin("sd")
    with pytest.raises(UserError, match="has no revisions"):
        locate(str(twin("sd")), revision="main")
    for missing in ("./nothing", str(tmp_path / "nothing"), "a/b/c", "nothing"):
        with pytest.raises(UserError, match="no such folder"):
            locate(missing)
    (tmp_path / "v1-5.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="from_single_file"):
        locate(str(tmp_path / "v1-5.safetensors"))
    monkeypatch.setenv("HOME", str(twin("sd").parent))
    assert locate("~/sd") == twin("sd")


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_id_without_network_fails_fast(variables: dict[str, str], tmp_path: Path) -> None:
    proxies = {
        key: "http://127.0.0.1:9" for key in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY")
    }
    script = "from sfumato.models.folder import locate; locate('nobody/nothing', 'v9', 'fp16')"
    environment = os.environ | {"HF_HOME": str(tmp_path)} | proxies | variables
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert time.monotonic() - start < 60
    assert "UserError: asked: the weights nobody/nothing at revision v9" in done.stderr, done.stderr
    assert "the hub cannot be reached" in done.stderr and "HF_HUB_OFFLINE" in done.stderr


def test_a_bad_hub_id_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="neither a folder"):
        download("a--b/c..d")


def test_a_cached_repository_is_used_offline(tmp_path: Path) -> None:
    repository, commit = tmp_path / "hub" / "models--me--toy", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(twin("sd"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = (
        "from sfumato.models.folder import examine; from sfumato.config import Model\n"
        "print(examine(Model(weights='me/toy')).folder)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str(repository / "snapshots" / commit), done.stderr


def test_only_what_training_reads_is_downloaded() -> None:
    from fnmatch import fnmatch

    wanted = patterns(twin("sdxl"), None)

    def taken(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in wanted)

    for file in twin("sdxl").rglob("*"):
        if file.is_file():
            assert taken(str(file.relative_to(twin("sdxl")))), file
    useless = [
        *("sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx"),
        *("vae_1_0/config.json", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack"),
        *("safety_checker/model.safetensors", "README.md"),
    ]
    assert not [name for name in useless if taken(name)]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in patterns(twin("sdxl"), "fp16")
    assert "diffusion_pytorch_model.safetensors" in patterns(twin("sdxl") / "vae", None)


def test_an_absent_optional_part_is_no_fault(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    change(folder / "model_index.json", lambda found: found.update(image_encoder=[None, None]))
    assert "image_encoder" not in read_facts(folder).components


def test_from_scratch_needs_no_weights_of_the_denoiser(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    (folder / UNET).unlink()
    load(folder, from_scratch=True).build_denoiser()

"""All that can be refused before a model is loaded is refused, at once and with our settings' names."""

import shutil
import tarfile
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from sfumato import config
from sfumato.check import check, rules
from sfumato.engine.ds_keys import DEEPSPEED_KEYS
from sfumato.engine.size import count
from sfumato.errors import UserError
from tests.unit import twins

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "sd"
    twins.write("sd", folder)
    return folder


@pytest.fixture
def settings(weights: Path, tmp_path: Path) -> Settings:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"number {number}")
    return {
        "name": "plan",
        "output": str(tmp_path / "runs"),
        "steps": 6,
        "batch_size": 4,
        "model": {"weights": str(weights)},
        "data": {"source": str(images), "store": str(tmp_path / "cache"), "resolution": 64},
    }


def refused(settings: Settings, world: int = 1, accelerator: str = "cpu") -> str:
    with pytest.raises(UserError) as caught:
        check(config.parse(settings), world, accelerator)
    return str(caught.value)


def test_attention_that_nobody_knows_is_refused_before_data_are_encoded(settings: Settings) -> None:
    for asked in ("flsh", {"mid_block.attn1": "flsh"}):
        told = refused(settings | {"engine": {"attention": asked}})
        assert 'engine.attention = "flsh"' in told and "_native_math" in told and "fastest" in told
    assert 'engine.attention = ""' in refused(settings | {"engine": {"attention": ""}})
    assert "for all or none" in refused(settings | {"engine": {"attention": {"mid_block.attn1": "fastest"}}})
    for asked in ("fastest", "native", {"mid_block.attn1": "_native_npu"}, {}):
        check(config.parse(settings | {"engine": {"attention": asked}}), 1, "cpu")


def test_a_plan_says_what_will_be(settings: Settings) -> None:
    plan = check(config.parse(settings), 2, "cpu")
    assert (plan.accumulation, len(plan.index), plan.facts.family) == (2, 3, "sd")
    text = str(plan)
    assert "4 = 1 on 2 cpu ranks, 2 times" in text
    assert "6, which are 8.00 epochs of 3 samples" in text
    assert not Path(settings["output"]).exists()


def test_a_slow_precision_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for known, accelerator, precision in product((True, False), ("cpu", "cuda"), ("bf16", "fp32")):
        monkeypatch.setattr(rules, "has_bf16", lambda known=known: known)
        settings["engine"] = {"precision": precision}
        told = "engine.precision=fp32 takes less time" in str(check(config.parse(settings), 1, accelerator))
        assert told is ((known, accelerator, precision) == (False, "cpu", "bf16"))


@pytest.mark.parametrize("by", ["the setting", "the weights"])
def test_a_last_step_that_is_never_learned_is_told(settings: Settings, tmp_path: Path, by: str) -> None:
    """Zero terminal SNR and min-SNR, whose weight is 0 without signal."""
    folder = twins.copy("sd", tmp_path)
    settings |= {"model": {"weights": str(folder)}, "objective": {"prediction": "v", "weight": "min_snr"}}
    words = "counts the last timestep"
    assert words not in str(check(config.parse(settings), 1, "cpu"))
    if by == "the setting":
        settings["objective"]["zero_terminal_snr"] = True
    else:
        place = folder / "scheduler/scheduler_config.json"
        twins.change(place, lambda told: told.update(rescale_betas_zero_snr=True))
    assert words in str(check(config.parse(settings), 1, "cpu"))
    settings["objective"]["weight"] = "uniform"
    assert words not in str(check(config.parse(settings), 1, "cpu"))


def test_weights_are_counted_from_the_headers(weights: Path) -> None:
    from diffusers import UNet2DConditionModel

    real = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(weights / "unet").parameters())
    assert count(list((weights / "unet").glob("*.safetensors"))) == real


def test_a_run_within_the_data_that_it_reads_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Its export's and previews' pictures would be data, and it could not go on."""
    images = tmp_path / "images"
    (tmp_path / "link").symlink_to(images)
    (images / "out").symlink_to(tmp_path / "runs")
    for output in ("images", "images/runs", "link/runs", "images/out"):
        assert "it lies within the source" in refused(settings | {"output": str(tmp_path / output)}), output
    others = shutil.copytree(images, tmp_path / "others", ignore=shutil.ignore_patterns("out"))
    held = settings | {"output": str(others / "runs"), "validation": {"source": str(others), "samples": 1}}
    assert f'within the source "{others}"' in refused(held)
    check(config.parse(settings | {"output": str(images / ".runs")}), 1, "cpu")
    # A list takes no pictures but those that it names.
    (others / "train.jsonl").write_text('{"file_name": "0.png", "text": "red"}\n')
    listed = settings | {"data": settings["data"] | {"source": str(others)}, "output": str(others / "runs")}
    check(config.parse(listed), 1, "cpu")


def test_all_mistakes_come_in_one_message(settings: Settings) -> None:
    settings["batch_size"] = 3
    settings["data"] |= {"source": "./nowhere", "resolution": 72}
    settings["engine"] = {
        "precision": "fp16",
        "deepspeed": {"gradient_clipping": 0.5, "wall_clock_break": True},
    }
    text = refused(settings, world=2)
    for words in (
        "batch_size = 3",
        "resolution = 72",
        "./nowhere",
        "fp16",
        "set optimizer.max_grad_norm",
        "did you mean wall_clock_breakdown?",
        "mend these 6",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("table", "values", "accelerator", "words"),
    [
        ("engine", {"precision": "fp16"}, "cpu", 'set "bf16" or "fp32"'),
        ("engine", {"precision": "fp16", "zero_stage": 0}, "cuda", "set engine.zero_stage = 1"),
        ("engine", {"deepspeed": {"zero_optimization": {"stage": 3}}}, "cpu", "set engine.zero_stage"),
        ("engine", {"deepspeed": {"train_batch_size": 8}}, "cpu", "set batch_size"),
        ("engine", {"deepspeed": {"fp16": {"enabled": True}}}, "cpu", "engine.precision"),
        ("engine", {"deepspeed": {"optimizer": {"type": "Adam"}}}, "cpu", "optimizer"),
        ("engine", {"deepspeed": {"tensorbord": {}}}, "cpu", "did you mean tensorboard?"),
        ("engine", {"deepspeed": {"zero_optimization": {"overlap_com": True}}}, "cpu", "overlap_com"),
        ("engine", {"deepspeed": {"elasticity": {}}}, "cpu", "elasticity"),
        ("objective", {"prediction": "auto", "zero_terminal_snr": True}, "cpu", "zero_terminal_snr"),
        ("objective", {"timesteps": {"kind": "range", "begin": 5, "end": 5000}}, "cpu", "5000"),
        ("model", {"weights": "./nowhere"}, "cpu", "./nowhere"),
        ("model", {"family": "sdxl"}, "cpu", "sdxl"),
        ("data", {"resolution": 65}, "cpu", "choose 64 or"),
    ],
)
def test_refused(settings: Settings, table: str, values: Settings, accelerator: str, words: str) -> None:
    settings[table] = settings.get(table, {}) | values
    assert words in refused(settings, accelerator=accelerator)


def test_deepspeeds_own_keys_pass(settings: Settings) -> None:
    settings["engine"] = {"deepspeed": {"zero_optimization": {"overlap_comm": True}, "dump_state": True}}
    assert check(config.parse(settings), 2, "cpu")


def test_what_is_moved_to_the_machine_must_fit_it(settings: Settings, monkeypatch: Any) -> None:
    """Of two machines each holds a half: 4 bytes of a master and 8 of AdamW's states for each weight."""
    settings |= {"engine": {"offload_optimizer": "cpu"}, "batch_size": 4, "micro_batch_size": 1}
    learns = check(config.parse(settings), 4, "cpu").parameters or 0
    monkeypatch.setattr(rules, "host_memory", lambda: 12 * learns - 1)
    assert "memory" in refused(settings)
    assert check(config.parse(settings), 4, "cpu", local=2)


def test_a_broken_first_image_is_found(settings: Settings) -> None:
    (Path(settings["data"]["source"]) / "0.png").write_bytes(b"no image")
    assert "0.png" in refused(settings)


def test_a_folder_that_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings["output"] = str(tmp_path / "file" / "runs")
    assert "is not a folder" in refused(settings)


def test_a_full_disk_is_foreseen(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    assert "a checkpoint takes" in refused(settings)


class Recording(dict[str, Any]):
    """A DeepSpeed configuration that remembers which of its keys were looked for."""

    read: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def keys_read() -> set[str]:
    """The top-level keys that the installed DeepSpeed reads and has not removed."""
    from deepspeed.runtime import config as theirs

    recording = Recording(train_batch_size=1)
    recording.read = set()
    # Another test may have left a process group, with which DeepSpeed reads more.
    with patch.object(theirs.dist, "get_rank", side_effect=RuntimeError):
        theirs.DeepSpeedConfig(recording)
    return recording.read - set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def check_known(known: frozenset[str]) -> None:
    assert known == keys_read(), f"only one of both: {known ^ keys_read()}"


def test_the_list_of_deepspeeds_keys_is_current() -> None:
    check_known(DEEPSPEED_KEYS)


@pytest.mark.parametrize("broken", [DEEPSPEED_KEYS - {"aio"}, DEEPSPEED_KEYS | {"gradient_cliping"}])
def test_a_wrong_list_is_caught(broken: frozenset[str]) -> None:
    with pytest.raises(AssertionError, match="only one of both"):
        check_known(broken)


def test_a_plan_of_several_parts_in_buckets_says_their_shares(settings: Settings, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(4):
        Image.new("RGB", (128, 32), (number, 0, 0)).save(other / f"{number}.png")
    (other / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(other / "9.png")
    parts = [{"source": settings["data"].pop("source"), "repeats": 3}, {"source": str(other), "prompt": "x"}]
    buckets = {"min": 32, "max": 128, "step": 16, "upscale": False}
    settings["data"] |= {"parts": parts, "buckets": buckets, "max_faults": 0.5}
    text = str(check(config.parse(settings), 1, "cpu"))
    for words in (
        "7 records in 2 parts, 1 set aside",
        "75.0% of the visits to the 3 of",
        "25.0% of the visits to the 4 of",
        "2, from 128x32 to 64x64",
        "1 unusable",
        "1 without a bucket: a side is shorter than 32",
        "of 2 there are fewer images than a batch",
        "2.00 epochs of 12 samples",
    ):
        assert words in text, f"{words!r} is not in {text}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"cache": "images"}, "set data.center_crop = true, or data.views"),
        ({"cache": "both", "center_crop": True, "tags": {"shuffle": True}}, "tags are drawn anew"),
        ({"buckets": {"step": 24}}, "data.buckets.step = 24"),
        ({"buckets": {"sizes": [[64, 72]]}}, "data.buckets.sizes"),
        ({"resolution": [64, 72]}, "data.resolution = 72"),
        ({"buckets": {"min": 128, "max": 64}}, "data.buckets"),
    ],
)
def test_data_that_cannot_be_is_refused(settings: Settings, data: dict[str, Any], words: str) -> None:
    settings["data"] |= data
    assert words in refused(settings)


def test_a_damaged_shard_has_a_line_of_its_own(settings: Settings, tmp_path: Path) -> None:
    images = Path(settings["data"]["source"])
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file in sorted(images.iterdir()):
                tar.add(file, file.name)
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 8])
    settings["data"] |= {"source": f"{tmp_path}/{{a,b}}.tar", "max_faults": 0.4}
    assert "1 of 2 shards damaged" in refused(settings)
    settings["data"]["max_faults"] = 0.5
    assert "1 of 2 shards damaged, by how much is unknown: b.tar is" in str(
        check(config.parse(settings), 1, "cpu")
    )


def test_too_many_faults_are_refused(settings: Settings) -> None:
    Path(settings["data"]["source"], "2.txt").unlink()
    text = refused(settings)
    assert "1 (33.33%)" in text and "no caption" in text and "data.max_faults" in text
    settings["data"]["max_faults"] = 0.4
    assert len(check(config.parse(settings), 1, "cpu").index) == 2

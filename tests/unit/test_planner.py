"""The planner's arithmetic: what fits, what is sent, how fast, what is recommended, and what it says."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import cli, config
from sfumato.config import Config, parse
from sfumato.errors import UserError
from sfumato.planner import command, costs, devices, rows, table
from sfumato.planner.answer import ALIKE, Answer, answer, because, choose, nothing_fits
from sfumato.planner.architectures import facts_of
from sfumato.planner.costs import cost_of, launches, sizes_of
from sfumato.planner.fit import memory, micro_batches, reserve
from sfumato.planner.meter import Amount
from sfumato.planner.rows import Ask
from sfumato.planner.speed import Work, speed
from sfumato.planner.trace import Cost
from sfumato.planner.traffic import Traffic, exchange, traffic
from sfumato.planner.ways import CHECKPOINTING, Offload, Way, possible, way_of, ways
from tests.unit import twins

WAY = Way(1, "none", False, "bf16")


def run(family: str = "sd", **changes: Any) -> Config:
    """A run of a toy model whose data are not here; a double underscore stands for the dot."""
    values: dict[str, Any] = {
        "steps": 100,
        "batch_size": 16,
        "model": {"weights": str(twins.twin(family))},
        "data": {"source": "nowhere", "resolution": 64},
    }
    for key, value in changes.items():
        table_, _, leaf = key.rpartition("__")
        (values.setdefault(table_, {}) if table_ else values)[leaf] = value
    return parse(values)


def cost(trained: dict[str, tuple[int, ...]], **changes: int) -> Cost:
    """A cost put together by hand."""
    values = {"flops": 3 * 10**12, "model_flops": 2 * 10**12, "activations": 10**8, "fixed": 10**6}
    values |= {"encode_flops": 10**11, "encode_peak": 10**7}
    peaks = (Amount(10**8, 10**8),)
    return Cost(**(values | changes), peaks=peaks, trained=trained, frozen={"vae": 10**6}, sharded=0)  # type: ignore[arg-type]


# What a rank holds.

SHAPES = st.dictionaries(
    st.text("abc", min_size=1), st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5
)
PRECISIONS = st.sampled_from(["fp32", "bf16"])


def held(way: Way, shapes: dict[str, tuple[int, int]], world: int, micro: int = 1) -> int:
    """Bytes on the device, with more micro-batches than one in a step."""
    given = run(batch_size=4096, engine__deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    return memory(way.of(given, micro), world, cost(dict(shapes))).device


@settings(max_examples=40, deadline=None)
@given(SHAPES, PRECISIONS, st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_more_ranks_never_need_more(
    shapes: dict[str, tuple[int, int]], precision: str, stage: int, world: int
) -> None:
    # Parts of many tensors are padded to whole multiples of the ranks.
    padding = 64 * 2 * world * len(shapes) * 16
    way = Way(stage, "none", False, precision)
    world = max(world, 2) if stage < 3 else world  # one rank alone has nobody to add gradients up with
    assert held(way, shapes, 2 * world) <= held(way, shapes, world) + padding


@settings(max_examples=40, deadline=None)
@given(SHAPES, PRECISIONS, st.integers(0, 3), st.sampled_from([1, 2, 8]))
def test_a_larger_micro_batch_never_needs_less(
    shapes: dict[str, tuple[int, int]], precision: str, stage: int, micro: int
) -> None:
    way = Way(stage, "none", False, precision)
    assert held(way, shapes, 4, 2 * micro) > held(way, shapes, 4, micro)


def test_a_higher_stage_never_needs_more() -> None:
    shapes = {f"layer{number}": (8000, 8000) for number in range(40)}  # more than stage 3 keeps gathered
    for precision in ("fp32", "bf16"):
        found = [held(Way(stage, "none", False, precision), shapes, 8) for stage in (1, 2, 3)]
        assert found == sorted(found, reverse=True) and found[2] < found[0]


def test_offload_never_needs_more_on_the_device() -> None:
    shapes = {f"layer{number}": (1000, 1000) for number in range(20)}
    for stage, last in ((1, "optimizer"), (2, "optimizer"), (3, "parameters")):
        kept = held(Way(stage, "none", False, "bf16"), shapes, 2)
        assert held(Way(stage, last, False, "bf16"), shapes, 2) < kept  # type: ignore[arg-type]


def test_micro_batches_divide_a_ranks_share() -> None:
    assert [*micro_batches(run(batch_size=56), 8)] == [7, 1]
    assert [*micro_batches(run(batch_size=12), 1)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(UserError, match="multiple of 5"):
        [*micro_batches(run(batch_size=12), 5)]


def test_the_reserve_is_a_share_or_a_least() -> None:
    assert reserve(80e9) == 4.8e9 and reserve(8e9) == 1e9


# What is sent.


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "passes"),
    [
        (0, "fp32", 2, 2 * 4),  # gradients summed, once a step
        (0, "bf16", 2, 2 * 4),  # fp32 weights in bf16 arithmetic
        (1, "bf16", 2, 2 * 2 + 2),  # gradients summed, weights gathered
        (1, "bf16", 1, 2 * 2 + 2),  # once a step with more micro-batches, too
        (2, "bf16", 2, 2 * 2 + 2),
        (2, "bf16", 1, 2 * (2 * 4) + 2),  # for each of two micro-batches, in fp32
        (3, "bf16", 2, 2 + 2 + 2),  # three passes
        (3, "bf16", 1, 2 * (2 + 2 + 4)),
    ],
)
def test_what_each_stage_sends(stage: int, precision: str, micro: int, passes: int) -> None:
    asked = Way(stage, "none", False, precision).of(run(), micro)
    numbers = 10**6
    assert traffic(asked, 8, 8, numbers, 0) == Traffic(round(passes * numbers * 7 / 8), 0)
    assert traffic(Way(stage, "none", False, precision).of(run(), micro), 1, 1, numbers, 0).link == 0


def test_a_shared_partition_gathers_within_the_machine() -> None:
    """hpZ: the backward pass's gather leaves the machine no more."""
    plain = WAY.of(run(), 1).model_copy(deep=True)
    three = replace(WAY, stage=3)
    shared = run(engine__deepspeed={"zero_optimization": {"zero_hpz_partition_size": 8}})
    before, after = (traffic(three.of(each, 1), 16, 8, 10**6, 0) for each in (plain, shared))
    assert after.network == before.network * 2 // 3 and after.link < before.link


def test_frozen_weights_travel_at_stage_3_alone() -> None:
    sent = [traffic(replace(WAY, stage=stage).of(run(), 2), 8, 8, 10, 10**9).link for stage in (1, 2, 3)]
    assert sent[0] == sent[1] < 100 and sent[2] > 1.7e9


def test_between_machines_only_their_share_travels() -> None:
    assert exchange(8e9, 2, 16, 8) == Traffic(15 * 10**9, 10**9)


@pytest.mark.parametrize(
    ("stage", "kept", "precision", "micro", "moved"),
    [
        (2, "none", "bf16", 1, 0),
        (1, "optimizer", "bf16", 1, 4 + 2),  # gradients in fp32, weights back
        (2, "optimizer", "bf16", 1, 4 + 2),  # bf16's sums stay on the device
        (1, "optimizer", "fp32", 1, 4 + 4),
        (2, "optimizer", "fp32", 2, 4 + 4),
        (2, "optimizer", "fp32", 1, 2 * 4 + 4 + 4 + 4),  # sums: down twice, up once
        (3, "optimizer", "bf16", 2, 2 * 2 + 4 + 2),  # sums: down and up
        (3, "optimizer", "bf16", 1, 2 * 2 * 4 + 4 + 2),
        (3, "parameters", "bf16", 2, 2 * 2 + 4 + 2 * 2),
        (3, "parameters", "bf16", 1, 2 * 2 * 4 + 4 + 2 * 2 * 2),
    ],
)
def test_offload_moves_gradients_and_weights(
    stage: int, kept: Offload, precision: str, micro: int, moved: int
) -> None:
    """Of 8 ranks with two samples each, in one micro-batch or two; bytes for each of a rank's numbers."""
    asked = Way(stage, kept, False, precision).of(run(batch_size=16), micro)
    assert traffic(asked, 8, 8, 8000, 0).host == 1000 * moved


# How fast.


def seconds(device: str = "A100-80", **changes: Any) -> float:
    found = speed(
        config=run(**changes), world=1, local=1, device=devices.find(device), work=Work(2e13, 5e12, 5000),
        sent=Traffic(0, 0), own=10**9, share=0.3, on_host=False,
    )  # fmt: skip
    assert found is not None
    return found.step


def test_a_step_takes_what_the_model_says() -> None:
    half = seconds(micro_batch_size=16)
    arithmetic = 16 * (2e13 + 5e12) / (312e12 * 0.3) + 1e9 * 34 / 2039e9
    assert half == pytest.approx(arithmetic)
    assert seconds("H100", micro_batch_size=16) < half
    vae = seconds(micro_batch_size=16, model__vae_dtype="fp32")
    assert vae == pytest.approx(half + 16 * 5e12 / (312e12 * 0.3))
    assert seconds(micro_batch_size=16, engine__precision="fp32") > 10 * half


@pytest.mark.parametrize(
    ("device", "rate", "micro", "flops", "encoding", "vae", "learns"),
    [
        ("A100-80", 30.65, 4, 25.44, 0.0, "bf16", 2567),  # train, with gradient checkpointing
        ("A100-80", 31.74, 7, 14.10, 4.95, "fp32", 6),  # LoRA
        ("A100-80", 32.44, 5, 20.02, 4.88, "bf16", 1251),  # ControlNet
        ("A100-80", 164.66, 24, 4.71, 0.0, "bf16", 2567),  # finetune at 512
        ("910B", 29.92, 4, 25.44, 0.0, "bf16", 2567),
        ("910B", 26.40, 7, 14.10, 4.95, "fp32", 6),
        ("910B", 166.71, 24, 4.71, 0.0, "bf16", 2567),
    ],
)
def test_published_rows_lie_in_the_range(
    device: str, rate: float, micro: int, flops: float, encoding: float, vae: str, learns: int
) -> None:
    """MindSpeed-MM's tables of SDXL on 8 cards, card A taken for an A100."""
    asked = run(batch_size=8 * micro, micro_batch_size=micro, engine__zero_stage=2, model__vae_dtype=vae)
    card, numbers = devices.find(device), learns * 10**6
    work, sent = Work(flops * 1e12, encoding * 1e12, 5000), traffic(asked, 8, 8, numbers, 0)
    low, usual, high = (
        speed(asked, 8, 8, card, work, sent, numbers // 8, share, False)
        for share in (card.low, card.usual, card.high)
    )
    assert low and usual and high
    assert low.images < rate < high.images and usual.images == pytest.approx(rate, rel=0.25)


def test_no_peak_no_speed() -> None:
    words = {"world": 1, "local": 1, "sent": Traffic(0, 0), "own": 1, "share": 0.3, "on_host": False}
    npu, asked = devices.find("910B"), run(engine__precision="fp32")
    assert speed(asked, device=npu, work=Work(1, 1, 1), **words) is None  # type: ignore[arg-type]


def test_devices_are_found_as_people_write_them() -> None:
    names = {
        "h100": "H100",
        "RTX 4090": "RTX-4090",
        "4090": "RTX-4090",
        "a100": "A100-80",
        "Ascend 910B": "910B",
    }
    assert {word: devices.find(word).name for word in names} == names
    with pytest.raises(UserError, match=r"did you mean H200\?"):
        devices.find("H20")
    with pytest.raises(UserError, match="known are A100-40"):
        devices.find("abacus")
    assert devices.like(12e9).name == "RTX-4090" and devices.like(85e9).name == "A100-80"
    assert devices.like(85e9, "NVIDIA H100 80GB HBM3").name == "H100"
    assert devices.like(42e9, "NVIDIA A100-SXM4-40GB").name == "A100-40"


# Which ways there are.


def test_ways_that_cannot_be_are_left_out() -> None:
    every = [*ways(run(), 2, others=True)]
    assert len(every) == len(set(every))
    assert {(way.stage, way.offload) for way in every if way.stage == 0} == {(0, "none")}
    assert not [way for way in every if way.precision == "fp16" and way.stage == 0]
    assert {way.stage for way in every if way.offload == "parameters"} == {3}
    lora = run(method={"kind": "lora", "base_bits": 4}, batch_size=2)
    assert {way.stage for way in ways(lora, 2)} == {0, 1, 2}
    assert not possible(lora, 2, Way(3, "none", False, "bf16"), "cuda")
    assert {way.stage for way in ways(run(engine={"compile": True}), 2)} == {0, 1, 2}


def test_auto_keeps_what_the_user_has_set() -> None:
    free = {(way.stage, way.checkpointing) for way in ways(run(engine="auto"), 2, better=True)}
    every = product((1, 2, 3), (False, "selective", True))  # 0 is never better in bf16
    assert free == {*every}
    compiled = run(engine={"auto": True, "compile": True})
    assert {way.checkpointing for way in ways(compiled, 2)} == {False, True}, "one cannot see into the other"
    asked = run(engine={"auto": True, "zero_stage": 2, "gradient_checkpointing": True})
    assert {(way.stage, way.checkpointing) for way in ways(asked, 2)} == {(2, True)}
    moved = run(engine={"auto": True, "offload_optimizer": "cpu"})
    assert {way.offload for way in ways(moved, 2)} == {"optimizer"}
    assert {way.offload for way in ways(run(), 2, "cpu", better=True)} == {"none"}


@pytest.mark.parametrize(
    "words",
    [
        ["engine=auto", "engine.precision=fp32"],
        ["engine.precision=fp32", 'engine="auto"'],
        ["engine.precision=fp32", "engine.auto=true", "engine.zero_stage=1"],
    ],
)
def test_auto_on_the_command_line(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'steps = 1\nbatch_size = 8\nmicro_batch_size = 4\n[model]\nweights = "x"\n[data]\nsource = "x"\n'
        "[engine]\nzero_stage = 3\ntimeout = 60\n"
    )
    found = config.load(file, words)
    free = "auto" in words[0] or "auto" in words[1] and len(words) == 2
    assert found.engine.auto and found.engine.precision == "fp32" and found.engine.timeout == 60
    assert ("zero_stage" in found.engine.model_fields_set) != free
    assert ("micro_batch_size" in found.model_fields_set) != free


def test_auto_as_text_in_a_file() -> None:
    assert run(engine="auto").engine == run(engine={"auto": True}).engine
    with pytest.raises(UserError, match='engine = "fast" is neither'):
        run(engine="fast")


# What is recommended.


def test_what_is_kept_of_activations_follows_from_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """All where it fits, then the dear ones, then none: each is as fast as it can be there."""
    fixed = {"auto": True, "zero_stage": 1, "offload_optimizer": "none"}
    asked = run(batch_size=8, micro_batch_size=8, engine=fixed)
    facts, device, taken = facts_of(asked.model), devices.find("H100"), {}
    # As a real model's, whose arithmetic takes longer than its kernels' starts.
    monkeypatch.setattr(costs, "FEWEST", 0)
    monkeypatch.setattr(costs, "LAUNCHED", {"full": 0})
    for kept in CHECKPOINTING:
        way = Way(1, "none", kept, "bf16")
        each = cost_of(asked, facts, way, sizes_of(asked)[-1])
        taken[kept] = memory(way.of(asked, 8), 1, each).device

    def chosen(room: float) -> Any:
        monkeypatch.setattr(rows, "reserve", lambda memory: memory - room)
        best = answer(Ask(asked, facts, 1, 1, 1e12, device), better=True).best
        return None if best is None else best.way.checkpointing

    assert taken[False] > taken["selective"] > taken[True]
    assert {kept: chosen(room) for kept, room in taken.items()} == {kept: kept for kept in CHECKPOINTING}
    assert chosen(taken[True] - 1) is None


def test_the_hosts_time_counts_for_each_way_to_keep_activations() -> None:
    trained = {str(number): (1,) for number in range(1000)}
    counts = [launches(run(engine__gradient_checkpointing=kept), cost(trained)) for kept in CHECKPOINTING]
    assert counts == [3000, 4950, 4350]


@pytest.fixture(scope="module")
def found() -> Answer:
    asked = run(micro_batch_size=2)
    return answer(Ask(asked, facts_of(asked.model), 2, 2, 1.1e9, devices.find("RTX-4090")))


def test_the_recommended_way_fits_and_no_plainer_one_is_faster(found: Answer) -> None:
    best = found.best
    assert best is not None and best.fits and best.memory.device <= found.ask.room
    assert 16 % (2 * best.micro) == 0
    for row in found.rows:
        assert row.fits == (row.memory.device <= found.ask.room)
        if row.fits:
            assert row.images["usual"] * (1 - ALIKE) <= best.images["usual"]
            plainer = row.way.plainness < best.way.plainness
            assert not (plainer and row.images["usual"] > best.images["usual"])


def test_what_does_not_fit_is_never_chosen(found: Answer) -> None:
    """However fast it would be; beside it a choice by speed alone, which would take it."""
    least = min(row.memory.device for row in found.rows)
    tight = answer(replace(found.ask, memory=1e9 + 1.1 * least))
    assert tight.best is not None and tight.best.memory.device <= 1.1 * least
    assert {row.fits for row in tight.rows} == {True, False}
    tempting = [row if row.fits else replace(row, images={"usual": 1e9}) for row in tight.rows]
    assert choose(tempting, "bf16") == tight.best
    assert not max(tempting, key=lambda row: row.images["usual"]).fits


def test_what_does_not_fit_the_machine_is_never_chosen(found: Answer) -> None:
    """Two ranks of a machine share its memory; without the figure what is moved there is taken to fit."""
    moved = {"auto": True, "zero_stage": 2, "offload_optimizer": "cpu"}
    ask = replace(found.ask, config=run(engine=moved))
    plain = answer(ask)
    assert plain.best is not None and plain.best.way.offload == "optimizer"
    needed = 2 * min(row.memory.host for row in plain.rows)
    assert answer(replace(ask, host=needed / 0.89)).best is not None
    tight = answer(replace(ask, host=needed / 0.91))
    assert tight.best is None and not any(row.lacks for row in tight.rows)
    error = nothing_fits(tight)
    assert "of the machine" in error.found and "more memory" in error.do
    assert "too much for the machine" in "\n".join(table.lines(tight))


def test_an_unknown_speed_is_not_told_as_a_number() -> None:
    """Of the 910B no source says fp32's peak."""
    asked = run(engine={"precision": "fp32", "gradient_checkpointing": True})
    npu = answer(Ask(asked, facts_of(asked.model), 1, 1, 64e9, devices.find("910B")))
    assert npu.best is not None and npu.best.way.plainness == min(row.way.plainness for row in npu.rows)
    assert npu.reason.startswith(f"the plainest of {len(npu.rows)} ways that fit, whose speeds are unknown")
    other = next(row for row in npu.rows if row.way.checkpointing is True)
    told = because(npu.rows, other)
    assert "without gradient checkpointing it would give a speed that is unknown" in told
    assert "images/s" not in told + npu.reason and "fastest" not in told + npu.reason


def test_the_answer_reads_well_at_80_columns(found: Answer) -> None:
    said = [*table.heading(found.ask), *table.lines(found, records=1000)]
    assert max(map(len, said)) <= 80, max(said, key=len)
    text = "\n".join(said)
    assert "<-" in text and found.reason.split(";")[0] in " ".join(text.split())
    assert "1.60 epochs of 1,000 records" in text and "[engine]" in text
    assert str(table.whole(found)["recommended"]["settings"]["micro_batch_size"]) in text


def test_what_is_written_is_the_recommended_way(found: Answer) -> None:
    import tomllib

    assert found.best is not None
    values = tomllib.loads("\n".join(table.written(found.best)))
    again = run(micro_batch_size=values["micro_batch_size"], engine=values["engine"])
    assert again.engine == found.best.config.engine
    assert again.micro_batch_size == found.best.micro


@pytest.mark.parametrize(("preset", "gigabytes"), [("sdxl-lora-12gb", 12), ("sdxl-full-24gb", 24)])
def test_presets_for_small_cards_fit(preset: str, gigabytes: int) -> None:
    asked = config.load(preset)
    way = way_of(asked)
    taken = memory(asked, 1, cost_of(asked, facts_of(asked.model), way, sizes_of(asked)[-1]))
    assert taken.device <= gigabytes * 1e9 - reserve(gigabytes * 1e9)


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "0"], "that is no size"),
        (["--memory", "nan"], "that is no size"),
        (["--memory", "8", "--host-memory", "-1"], "that is no size"),
        (["--memory", "8", "engine.offload_optimizer=nvme"], "set engine.zero_stage = 3"),
        (["--memory", "8", "engine.zero_stage=0", "engine.offload_optimizer=cpu"], "zero_stage = 1"),
        (["--memory", "8", "engine=Auto"], 'engine = "Auto" is neither "auto" nor a table'),
        (["--device", "H20", "--memory", "80"], "did you mean H200?"),
        ([], "neither --memory nor --device"),
        (["--memory", "8", "--gpus", "3"], "a multiple of 3"),
        (["--memory", "8", "--json", "/no/such/folder/x.json"], "no folder"),
    ],
)
def test_a_faulty_question(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "sdxl-train-bf16", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_no_such_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "sdxl-lor", "--memory", "8"]) == 2
    assert 'did you mean "sdxl-lora"?' in capsys.readouterr().err


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    asked = run(micro_batch_size=2, ema__enabled=True)
    with pytest.raises(UserError) as error:
        command.plan(asked, 1, 1, 1.0001, None, False, None, None)
    assert "lacks" in error.value.found and "take devices of 2 GB or more" in error.value.do
    assert 'data.cache = "both" saves most' in error.value.do or "saves most" in error.value.do
    assert "GB too much" in capsys.readouterr().out


def test_sizes_come_from_the_settings() -> None:
    assert sizes_of(run(data__resolution=[64, 128])) == [(64, 64), (128, 128)]
    several = sizes_of(run(data__resolution=128, data__buckets=True))
    assert len(several) > 1 and several[-1][0] * several[-1][1] <= 128**2


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    asked = ["plan", "sd15-full", "--gpus", "3", "--memory", "80"]
    code = f"import sys; from sfumato.cli import main; print(main({asked}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"] and "a multiple of 3" in done.stderr, done

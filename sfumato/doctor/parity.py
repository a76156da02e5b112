"""What the doctor says of the engine: its gradient, AdamW's first step, the same step again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.doctor.gradient import measure, merged
from sfumato.doctor.lines import Line, bad, good, judged, unseen
from sfumato.doctor.rounds import Rounds, named, trouble
from sfumato.doctor.twin import at_hand
from sfumato.engine.ds_config import autocast
from sfumato.engine.engine import Engine

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "autocast": 2e-2, "fp16": 1e-2}
"""Relative distance from plain torch in the same arithmetic (fp16: in fp32). Measured right cells: 8e-8 in
fp32, where only the order of sums differs; 5e-3 in bf16, whose numbers have 8 bits, and 6e-3 under autocast.
What goes wrong is far beyond: a rank left out 0.5 and more, a double backward 0.7, a factor of two 1."""
FAR = {"fp32": 1e-5, "bf16": 0.15, "autocast": 0.15, "fp16": 1e-2}
"""The same from plain torch in fp32, where bf16's own arithmetic counts as well; a wrong kernel gave 0.48."""
OWN, MOST = 1.5, 0.1
"""In bf16 the engine may also be so many times as far from plain torch as plain bf16 is from fp32: another
attention kernel rounds elsewhere. A LoRA of the toy SDXL was at 1.5e-2. But never farther than `MOST`."""
ADAMW = 1e-2
"""AdamW's first step turns tiny gradients into whole ones, whose signs rounding may change."""
LIMIT, LIMIT_COMPILED, LIMIT_REAL = 60.0, 100.0, 600.0  # seconds
DO = "do not train with these settings: try engine.zero_stage = 1 without [engine.deepspeed], and report it"


def look(
    rounds: Rounds, config: Config, toy: Path | None, kind: Callable[..., Engine] = Engine
) -> list[Line]:
    """Gradient, first step and determinism of the config's engine."""
    name = "gradient"
    if rounds.apart:
        return [unseen(name, rounds.apart)] if rounds.first else []
    place = rounds.place
    limit = LIMIT_REAL if toy is None else LIMIT_COMPILED if config.engine.compile else LIMIT
    answers = rounds.ask(lambda: measure(config, place, toy, kind), limit, together=True)
    if not rounds.first:
        return []
    if wrong := trouble(name, answers):
        return wrong
    told = [answer.said for answer in answers]
    what = described(config, rounds.place.world, told[0]["batch"], toy is not None)
    found = [gradient(config, told, what), told_numbers(config, told)]
    if "adamw" in told[0]:
        step = merged([said["adamw"] for said in told])
        text = f"AdamW's is {step['error']:.1e} off its formula (at most {ADAMW:g})"
        found.append(judged(step["error"] <= ADAMW, "first step", text, DO, grave=True, **step))
    same = [rank for rank, said in enumerate(told) if not said["again"]]
    text = f"the same step gave other bits on {named(same)}" if same else "one step twice: the same bits"
    do = "nothing, unless runs must repeat to the bit: some kernels of GPUs add up in an order of their own"
    return [*found, judged(not same, "repeated", text, do)]


def arithmetic(config: Config) -> str:
    """The kind of arithmetic, as tolerances have it."""
    return "autocast" if autocast(config) else config.engine.precision


def described(config: Config, world: int, batch: Sequence[int], toy: bool) -> str:
    """The settings that were tried."""
    engine = config.engine
    checkpointing = "checkpointing" if engine.gradient_checkpointing else ""
    if engine.gradient_checkpointing == "selective":
        checkpointing = "selective checkpointing"
    waits = engine.offload_optimizer
    if waits == "nvme" and not at_hand(config):
        waits = "cpu"
    named = engine.attention if isinstance(engine.attention, str) else "attention by layers"
    extra = [
        checkpointing,
        "compiled" if engine.compile else "",
        f"optimizer on {waits}" if waits != "none" else "",
        named if engine.attention else "",
        "own DeepSpeed keys" if engine.deepspeed else "",
        "clipped" if config.optimizer.max_grad_norm else "",
    ]
    model = "toy twin" if toy else "the model itself"
    micro, whole = batch
    size = f"{micro} x {world} x {whole // micro // world}"
    parts = [f"ZeRO {engine.zero_stage}", arithmetic(config), f"batch {size}", *filter(None, extra)]
    return f"{model}, {config.method.kind}, {', '.join(parts)}"


def gradient(config: Config, told: Sequence[Any], what: str) -> Line:
    """The gradient's line."""
    kind = arithmetic(config)
    same, exact = (merged([said[side] for said in told]) for side in ("same", "exact"))
    bound = allowed(kind, told[0]["rounding"])
    near = same["error"] <= bound
    text = f"{same['error']:.1e} off plain torch's (at most {bound:.2g})"
    figures = {"same": same, "exact": exact}
    if kind in ("bf16", "autocast") and exact["error"] < told[0]["rounding"] / 10:
        text = f"it is fp32's ({exact['error']:.1e} off), but {kind} was asked for"
        return bad("gradient", f"{text}; {what}", DO, **figures)
    if near and exact["error"] <= FAR[kind]:
        return good("gradient", f"{text}; {what}", **figures)
    if near:
        text = f"as plain torch's in {kind}, but {exact['error']:.1e} off fp32's: a kernel is wrong"
        return bad(
            "gradient",
            f"{text}; {what}",
            "set engine.precision = fp32, or another engine.attention",
            **figures,
        )
    if same["angle"] > 0.999:
        text += f": {same['factor']:.3g} times as long, in its direction"
    else:
        text += f"; most in {same['worst']}"
    return bad("gradient", f"{text}; {what}", DO, **figures)


def allowed(kind: str, rounding: float) -> float:
    """How far the gradient may be. rounding: of plain torch in the same arithmetic, from fp32."""
    return max(TOLERANCE[kind], min(MOST, OWN * rounding))


def told_numbers(config: Config, told: Sequence[Any]) -> Line:
    """Whether loss and gradient norm are told right."""
    kind = arithmetic(config)
    bound = allowed(kind, told[0]["rounding"])
    wrong = []
    for name, key in (("loss", "loss"), ("gradient norm", "norm")):
        for rank, said in enumerate(told):
            ours, plain = said[key]
            if not abs(ours - plain) <= bound * abs(plain):
                wrong.append(f"the {name} on rank {rank} is {ours:.6g}, not {plain:.6g}")
                break
    loss, norm = told[0]["loss"][0], told[0]["norm"][0]
    text = "; ".join(wrong) or f"loss {loss:.4g} and gradient norm {norm:.4g}: of the whole batch"
    return judged(not wrong, "told", text, DO, grave=True, loss=told[0]["loss"], norm=told[0]["norm"])

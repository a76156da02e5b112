"""Which of diffusers' attention backends can train here, and how long they take for a config's shapes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from sfumato.config import FASTEST, Config
from sfumato.doctor import twin
from sfumato.doctor.lines import Line, bad, good
from sfumato.errors import UserError
from sfumato.models.attention import backends, fault, probe
from sfumato.models.fastest import USUAL, Work, timed
from sfumato.models.folder import Facts
from sfumato.models.loading import DTYPES

KNOWN = {"sdxl": (64, 10, 64, 1024), "sd": (64, 8, 40, 512)}
"""Of well-known models: latents along a side at the first layer with attention, heads, their width, and the
side of the picture in pixels."""
MOST = {"cpu": 1024, "other": 2**14}
"""Tokens beyond which timing takes too long, or native arithmetic too much memory."""


@dataclass(frozen=True)
class Shape:
    """Attention as the denoiser has it at its first layer: queries (1, tokens, heads, width)."""

    tokens: int
    heads: int
    width: int


def shape_of(config: Config | None, family: str, facts: Facts | None) -> Shape:
    """The shape of the config's largest picture, by the model's own config where it is at hand."""
    side = max(config.data.resolutions) if config is not None else KNOWN.get(family, KNOWN["sd"])[3]
    if facts is not None and "block_out_channels" in facts.denoiser:
        net = facts.denoiser
        kinds = net.get("down_block_types", ["CrossAttn"])
        level = next((number for number, kind in enumerate(kinds) if "Attn" in kind), 0)
        heads = net.get("num_attention_heads") or net["attention_head_dim"]
        count = heads if isinstance(heads, int) else heads[level]
        along = side // facts.vae_factor // 2**level
        return Shape(along**2, count, net["block_out_channels"][level] // count)
    along, count, width, usual = KNOWN.get(family, KNOWN["sd"])
    return Shape((along * side // usual) ** 2, count, width)


def measure(
    config: Config | None, family: str, facts: Facts | None, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """All in one line, as `Line.plain`. seconds: after which no other backend is timed."""
    precision = config.engine.precision if config is not None else "bf16"
    dtype, shape = DTYPES[precision], shape_of(config, family, facts)
    most = MOST["cpu" if device.type == "cpu" else "other"]
    tokens = min(shape.tokens, most)
    said = (config.engine.attention if config is not None else None) or USUAL
    asked = [USUAL] if said == FASTEST else backends(said)
    names = [USUAL, *sorted(member.value for member in AttentionBackendName if member.value != USUAL)]
    names.sort(key=lambda name: name not in (USUAL, *asked))
    works, fails, untimed = {}, {}, []
    end = time.monotonic() + seconds
    for name in names:
        if fault(name) is not None:
            continue
        try:
            probe(name, device, dtype, shape.width)
        except UserError as error:
            fails[name] = error.found
            continue
        if time.monotonic() > end:
            untimed.append(name)
            continue
        works[name] = timed(name, Work(1, tokens, tokens, shape.heads, shape.width), device, dtype)
    taken = "for each kind of layer the fastest" if said == FASTEST else ", ".join(asked)
    return [verdict(asked, taken, works, fails, untimed, f"{precision}, {tokens} tokens").plain()]


def verdict(
    asked: Sequence[str],
    taken: str,
    works: dict[str, float],
    fails: dict[str, str],
    untimed: list[str],
    what: str,
) -> Line:
    """What is said of them."""
    order = sorted(works, key=lambda name: works[name])
    shown = ", ".join(f"{name} {works[name] * 1e3:.1f} ms" for name in order)
    text = f"{shown} ({what}, forward and backward); taken: {taken}"
    if untimed:
        text += f"; work too, not timed: {', '.join(untimed)}"
    if fails:
        text += f"; of no use for training here: {', '.join(fails)}"
    figures = {"seconds": works, "fails": fails}
    for name in asked:
        if name not in works and name not in untimed:
            why = fails.get(name) or fault(name) or "it does not work"
            do = f"set engine.attention to one of {', '.join(order)}"
            return bad("attention", f"{name}: {why}", do, **figures)
    return good("attention", text, **figures)


def facts_at_hand(config: Config | None) -> Facts | None:
    """What the config's model folder says, None where it is not here or says nothing sound."""
    try:
        return twin.facts_of(config) if config is not None else None
    except UserError:
        return None

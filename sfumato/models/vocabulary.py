"""CLIP's vocabulary without a download: the tokenizer folder of SD and SDXL from the merges we ship.

clip_merges.txt.gz holds the 48,894 byte-pair merges that OpenAI's CLIP uses (MIT), in order.  The ids follow
from them: 256 bytes, the same 256 ending a word, one id for each merge, and the two marks of begin and end.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SIZE = 49408
WINDOW = 77  # tokens, both marks included


def byte_characters() -> list[str]:
    """256 printable characters that stand for the bytes, in the order of CLIP's ids.

    Bytes that print as Latin-1 stand for themselves and come first; the others follow from U+0100 on.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in shown] + [chr(256 + extra) for extra in range(256 - len(shown))]


def merges() -> list[tuple[str, str]]:
    """The merges in order of rank."""
    packed = (Path(__file__).parent / "clip_merges.txt.gz").read_bytes()
    pairs = [line.split(" ") for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    return [(left, right) for left, right in pairs]


def vocabulary() -> dict[str, int]:
    """Token -> id, 49,408 of them."""
    single = byte_characters()
    tokens = (
        single + [f"{one}</w>" for one in single] + [left + right for left, right in merges()] + [BEGIN, END]
    )
    assert len(tokens) == len(set(tokens)) == SIZE, f"{len(set(tokens))} tokens instead of {SIZE}"
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: str | Path, pad: str = END) -> Path:
    """Write a folder that `CLIPTokenizer.from_pretrained` reads.

    `pad` is END for SD 1.x and SDXL's first tokenizer, "!" (id 0) for SD 2.x and SDXL's second.
    """
    ids = vocabulary()
    if pad not in ids:
        raise ValueError(
            f"asked for the padding token {pad!r}, found none such in CLIP's vocabulary; use {END!r} or '!'"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": WINDOW,
        "do_lower_case": True,
        **special,
    }
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def drop_copy(folder: Path) -> None:
    """Take tokenizer.json, which transformers writes, out of a folder of `write_tokenizer`.

    vocab.json and merges.txt hold the same, as in the folders of the hub, and are read four times as fast.
    """
    (folder / "tokenizer.json").unlink(missing_ok=True)

"""The demo's text encoder: a small transformers CLIPTextModel whose states say what a thing looks like.

It is trained contrastively (symmetric InfoNCE, as in CLIP) to match an emoji's name with the
EfficientNet-Lite0 features of its Noto and Twemoji drawings; the image side is one linear layer, thrown
away afterwards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.demo import emoji, measure
from sfumato.demo.autoencoder import BASE_STYLES, RESOLUTION, on_white, premultiplied, rate
from sfumato.models.vocabulary import SIZE, WINDOW, write_tokenizer

PHRASES = ("{}", "{}", "{}", "a {}", "an emoji of a {}", "a drawing of a {}", "a picture of a {}", "the {}")
COLDEST = math.log(100.0)  # CLIP's bound on the logarithm of the inverse temperature


def new_text_encoder(width: int = 64, layers: int = 3, heads: int = 4) -> CLIPTextModel:
    """An untrained CLIPTextModel; with 49407 as its end id it pools the first END, not the padding."""
    config = CLIPTextConfig(
        vocab_size=SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=WINDOW,
        bos_token_id=SIZE - 2,
        eos_token_id=SIZE - 1,
        pad_token_id=SIZE - 1,
    )
    return CLIPTextModel(config)


def name_ids(tokenizer: CLIPTokenizer, names: list[str]) -> Tensor:
    """Token ids (N, 77) of every name in every phrase: (len(PHRASES), N, 77)."""
    rows = [
        tokenizer([phrase.format(n) for n in names], padding="max_length", max_length=WINDOW)
        for phrase in PHRASES
    ]
    return torch.tensor([row.input_ids for row in rows])


def picture_features(codes: list[str]) -> Tensor:
    """Features of the base styles' drawings, (styles, N, 1280), centred, of unit standard deviation."""
    sets = [emoji.drawings(style, codes, RESOLUTION) for style in BASE_STYLES]
    found = torch.stack([measure.features((on_white(premultiplied(one)) + 1) / 2) for one in sets])
    found = found - found.mean((0, 1))
    return found / found.std()


def spoken(states: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Two readings of each text, (2, B, d): its state at the first END and at a random later place.

    A U-Net's attention reads all 77 states; the second reading makes the padding say the same as the END.
    """
    rows = torch.arange(len(ids))
    end = (ids == SIZE - 1).int().argmax(1)  # (B,)
    later = end + (torch.rand(len(ids), generator=generator) * (WINDOW - end)).long()
    return torch.stack([states[rows, end], states[rows, later]])


def contrast(texts: Tensor, pictures: Tensor, cold: Tensor) -> Tensor:
    """Symmetric InfoNCE of (B, d) and (B, d), rows belonging together; `cold` is log(1 / temperature)."""
    texts, pictures = functional.normalize(texts, dim=-1), functional.normalize(pictures, dim=-1)
    logits = cold.clamp(max=COLDEST).exp() * texts @ pictures.T  # (B, B)
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def found_again(model: CLIPTextModel, head: nn.Module, ids: Tensor, pictures: Tensor) -> float:
    """Share of texts (N, 77) whose most similar picture among (N, 1280) is their own."""
    texts = functional.normalize(model(input_ids=ids).pooler_output, dim=-1)
    similar = texts @ functional.normalize(head(pictures), dim=-1).T
    return float((similar.argmax(1) == torch.arange(len(ids))).float().mean())


def train_text_encoder(
    out: str | Path,
    steps: int = 500,
    batch: int = 192,
    peak: float = 2e-3,
    seed: int = 0,
    tokenizer_folder: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train, write the encoder to `out` and the tokenizer beside it, and give the numbers."""
    out = Path(out)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    folder = write_tokenizer(tokenizer_folder or out.parent / "tokenizer")
    codes = list(emoji.files("noto"))
    ids = name_ids(CLIPTokenizer.from_pretrained(folder), [emoji.captions()[code] for code in codes])
    pictures = picture_features(codes)
    weights = torch.tensor([3.0 if code in emoji.concepts() else 1.0 for code in codes])
    rows = torch.tensor([codes.index(code) for code in emoji.concepts()])
    model, head = new_text_encoder().train(), nn.Linear(measure.WIDTH, 64)
    cold = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    learned = [*model.parameters(), *head.parameters(), cold]
    adam = torch.optim.AdamW(learned, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    start = time.monotonic()
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate(step / steps, peak, 0.1)
        chosen = torch.multinomial(weights, batch, generator=draw)  # without replacement: no false negatives
        phrase = torch.randint(len(PHRASES), (batch,), generator=draw)
        style = torch.randint(len(pictures), (batch,), generator=draw)
        seen = pictures[style, chosen]  # (B, 1280)
        with torch.autocast("cpu", torch.bfloat16):
            states = model(input_ids=ids[phrase, chosen]).last_hidden_state  # (B, 77, d)
        images = head(functional.dropout(seen, 0.1))
        first, later = spoken(states.float(), ids[phrase, chosen], draw)
        loss = (contrast(first, images, cold) + contrast(later, images, cold)) / 2
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adam.step()
        if (step + 1) % 50 == 0:
            again = found_again(model.eval(), head, ids[0, rows], pictures[0, rows])
            model.train()
            spent = (time.monotonic() - start) / (step + 1)
            tell(
                f"step {step + 1} {spent:.3f} s/step loss {float(loss.detach()):.3f} found again {again:.3f}"
            )
    model.eval().half().save_pretrained(out)
    again = found_again(model.float(), head, ids[0, rows], pictures[0, rows])
    numbers = {"found_again": again, "parameters": sum(p.numel() for p in model.parameters())}
    (out / "measured.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return numbers

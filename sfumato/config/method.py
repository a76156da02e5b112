"""Which model is trained, and what of it learns."""

from typing import Literal

from pydantic import Field, field_validator

from sfumato.config.section import Section


class Model(Section):
    """Which model is trained, and from which weights."""

    weights: str = Field(min_length=1)
    """A diffusers folder, or a hub id such as "stabilityai/stable-diffusion-xl-base-1.0"."""
    family: str | None = None
    """"sd", "sdxl", or another file of sfumato/models; unset: read from the folder's model_index.json."""
    revision: str | None = None
    """The hub revision of `weights`."""
    variant: str | None = None
    """The file variant to read, such as "fp16" for diffusion_pytorch_model.fp16.safetensors."""
    vae: str | None = None
    """Another VAE (folder or hub id) in place of the one in `weights`."""
    vae_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the frozen VAE; "auto" is bf16 under bf16 training and fp32 otherwise, never fp16."""
    from_scratch: bool = False
    """Start the trained part from random numbers, built from the folder's config files."""
    prompt_window: Literal[77, 150, 225] = 77
    """Tokens of a prompt that are read: 77, or two or three windows of 75 encoded one by one and joined."""


class Full(Section):
    """Every weight of the denoiser learns."""

    kind: Literal["full"] = "full"
    text_encoders: bool = False
    """Train the text encoders as well."""


class LoRA(Section):
    """Small matrices beside the denoiser's layers learn; the layers stay (arXiv:2106.09685). Needs peft."""

    kind: Literal["lora"]
    rank: int = Field(16, ge=1)
    """Columns of the small matrices."""
    alpha: float | None = Field(None, gt=0)
    """Their product counts alpha / rank times; unset: once."""
    targets: tuple[str, ...] = ()
    """The layers: ends of their names such as "to_q", or patterns such as "re:.*attn2.*to_[kv]"; unset:
    those of the family."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a small matrix's inputs that is left out while training."""
    dora: bool = False
    """Learn the length of each layer's columns besides (arXiv:2402.09353)."""
    rslora: bool = False
    """Count the product alpha / sqrt(rank) times (arXiv:2312.03732)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How the first small matrix is drawn; the second starts at 0, so that nothing is changed at step 0."""
    text_encoders: bool = False
    """Give the text encoders such matrices as well."""
    base_bits: Literal[4, 8] | None = None
    """Hold the frozen linear layers in 4 (NF4) or 8 bits, for less memory; needs bitsandbytes. Unset: as
    engine.precision says."""


class ControlNet(Section):
    """A copy of the denoiser's first half learns to steer it by a second image (arXiv:2302.05543).

    The data need data.conditioning_column.
    """

    kind: Literal["controlnet"]
    weights: str | None = None
    """A ControlNetModel to go on from: a folder, a run or a hub id; unset: a copy of the denoiser."""


class TextualInversion(Section):
    """A new word's vectors learn, and nothing else (arXiv:2208.01618)."""

    kind: Literal["textual_inversion"]
    word: str = Field("<new>", pattern=r"^\S+$")
    """The new word, without spaces and capitals; captions hold it."""
    like: str | None = None
    """A word of the vocabulary that it starts from; unset: it starts from random numbers."""
    vectors: int = Field(1, ge=1, le=74)
    """How many vectors, each in the place of a token of the prompt, the word stands for."""

    @field_validator("word")
    @classmethod
    def _small(cls, word: str) -> str:
        if word != word.lower():
            raise ValueError(f'"{word}" has capitals, which CLIP\'s tokenizers do not know; "{word.lower()}"')
        return word

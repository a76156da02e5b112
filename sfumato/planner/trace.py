"""What one step takes, found by running it at its real size without numbers.

The step is the loop's own: the family's modules, the method's `build`, `encode` and `predict`, the objective,
all on torch's meta device. No weights are read and nothing is computed, so that SDXL at 1024 pixels takes
seconds on a CPU. Whatever family or method there is, is planned by this one path.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import methods, models
from sfumato.config import Config
from sfumato.data.batch import Batch, Draws
from sfumato.engine.ds_config import autocast
from sfumato.methods import Method
from sfumato.models.family import Family
from sfumato.models.folder import Facts
from sfumato.models.loading import DTYPES, frozen_dtypes, held_parts, quiet
from sfumato.models.texts import Condition
from sfumato.objective import Objective
from sfumato.planner.architectures import published_words
from sfumato.planner.kernels import Kernels
from sfumato.planner.meter import Amount, Meter

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """Arithmetic and memory of training at one size, on one rank; FLOPs are a multiply-add's two.

    No field holds weights, gradients of parameters, or states of the optimizer: planner.state has those.
    """

    flops: int
    """Of one sample's forward and backward pass as they are executed, with what is computed again."""
    model_flops: int
    """The same without what is computed again."""
    activations: int
    """Bytes that autograd keeps for the backward pass, for each sample of a micro-batch ..."""
    fixed: int
    """... and those that do not grow with it, such as casts of frozen weights."""
    peaks: tuple[Amount, ...]
    """The bytes alive at the moments of encoding, forward and backward pass that can be the fullest, besides
    weights and parameters' gradients: what is kept, the batch itself, and all that lives shortly."""
    encode_flops: int
    """Of the frozen VAE and text encoders, for one sample, where they are not cached."""
    encode_peak: int
    """The most bytes alive while they encode one sample, the batch among them."""
    trained: dict[str, tuple[int, ...]]
    """The shape of each parameter that learns, by the engine's name for it."""
    frozen: dict[str, int]
    """Bytes of frozen weights on the device, by part."""
    sharded: int
    """The bytes among them that are inside the engine's module: ZeRO stage 3 cuts them up."""

    def step_peak(self, samples: int) -> int:
        """The most bytes alive besides weights and gradients with so many samples in a micro-batch."""
        return fullest(self.peaks, samples)


def fullest(moments: Iterable[Amount], samples: int) -> int:
    """The most bytes of some moments, with so many samples in a micro-batch."""
    return max((moment.of(samples) for moment in moments), default=0)


def trace(config: Config, facts: Facts, size: tuple[int, int]) -> Cost:
    """What a step of a run takes with pictures of `size` (height, width) pixels.

    It depends on the model, the method, the caches, precision and gradient checkpointing, and on the ZeRO
    stage only as stage 0 casts and the others do not: asked again with the same, it answers at once.
    Raises UserError where the method cannot be made for the model.
    """
    engine: dict[str, Any] = {"zero_stage": 0 if autocast(config) else 1, "attention": None, "deepspeed": {}}
    engine |= {"compile": False}
    plain = config.model_copy(update={"engine": config.engine.model_copy(update=engine)})
    said = plain.model_dump_json(include={"model", "method", "data", "objective", "engine", "preview"})
    return _trace(_Same(said, plain), _Same(repr(facts), facts), size)


class _Same:
    """A value that is equal to another if their keys are."""

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.value = key, value

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.key == other.key


@lru_cache(64)
def _trace(config: _Same, facts: _Same, size: tuple[int, int]) -> Cost:
    stage = Stage(config.value, facts.value)
    step = rehearse(stage, size)
    return Cost(
        flops=step.flops.of(1),
        model_flops=(step.flops - step.recomputed).of(1),
        activations=step.kept.slope,
        fixed=step.kept.fixed,
        peaks=step.peaks,
        encode_flops=step.encode_flops.of(1),
        encode_peak=fullest(step.encode_peaks, 1),
        trained={name: tuple(p.shape) for name, p in stage.parts.named_parameters() if p.requires_grad},
        frozen={name: size for name, size in stage.frozen().items() if size},
        sharded=sum(frozen_bytes(part) for part in stage.parts.children()),
    )


class Stage:
    """What a run's loop has in its hands, without numbers: family, method, parts and objective."""

    def __init__(self, config: Config, facts: Facts) -> None:
        self.config, self.facts = config, facts
        self.encodes = held_parts(config)
        family = bare_family(config, facts)
        with quiet(), torch.device(META):
            self.method: Method = methods.build(config, family)
            self.family = self.method.family
            self.parts = self.method.build()
            if not autocast(config):
                self.parts.to(DTYPES[config.engine.precision])
            self.method.settle(self.parts)
        self.objective = Objective(config.objective, family.scheduler_config)
        self.lower = torch.bfloat16 if autocast(config) else None
        self.selective = config.engine.gradient_checkpointing == "selective"

    def frozen(self) -> dict[str, int]:
        """Bytes of frozen weights and of buffers by part: those of the engine's module, and the encoders."""
        found = {name: frozen_bytes(part) for name, part in self.parts.named_children()}
        images, captions = (held or bool(self.config.preview.prompts) for held in self.encodes)
        for name, part in self.outside(images, captions).items():
            found.setdefault(name, frozen_bytes(part))  # an encoder that learns is in the engine's module
        return found

    def outside(self, images: bool, captions: bool) -> dict[str, nn.Module]:
        """The frozen parts that encode images, and those that encode captions."""
        found: dict[str, nn.Module] = {"vae": self.family.vae} if images else {}
        return found | (self.family.text_encoders if captions else {})

    def text_of(self, samples: int) -> dict[str, Tensor] | None:
        """So many captions as the cache gives them; None where they are encoded while training."""
        if self.encodes[1]:
            self.family.null_condition()  # made once in a run, so that it is no step's
        if self.encodes[1] or self.config.learns_text:
            return None
        said = self.config.model.model_dump_json()
        rows = _caption(_Same(f"{said} {self.family.dtype}", self.family), _Same(repr(self.facts), None))
        return {
            name: torch.empty((samples, *row.shape[1:]), dtype=row.dtype, device=META)
            for name, row in rows.items()
        }

    def batch(self, size: tuple[int, int], samples: int, text: dict[str, Tensor] | None) -> Batch:
        """A micro-batch as the loader makes it of pictures of `size` (height, width), text of `text_of`."""
        family, data = self.family, self.config.data
        height, width = (side // family.vae_factor for side in size)
        latents = (samples, family.latent_channels, height, width)
        empty = partial(torch.empty, device=META)
        perturbed = empty(latents) if self.config.objective.input_perturbation else None
        offset = empty((*latents[:2], 1, 1))
        draws = Draws(empty(latents), empty(latents), empty(samples), offset, perturbed)
        parameters = family.latent_channels * (1 if data.posterior == "mean" else 2)
        pixels = (samples, 3, *size)
        hinted = any(layout.conditioning_column for layout in data.layouts)
        return Batch(
            ids=empty(samples, dtype=torch.long),
            visits=empty(samples, dtype=torch.long),
            captions=[""] * samples,
            dropped=empty(samples, dtype=torch.bool),
            size_and_crop=empty(samples, 6),
            draws=draws,
            pixels=empty(pixels) if self.encodes[0] else None,
            moments=None
            if self.encodes[0]
            else empty(samples, parameters, height, width, dtype=family.vae_dtype),
            text=text,
            hint=empty(pixels) if hinted else None,
        )


def bare_family(config: Config, facts: Facts) -> Family:
    """The model's family, whose frozen parts have shapes and no numbers."""
    dtypes = frozen_dtypes(config)
    family: Family = models.family_class(facts.family)(facts.folder, config.model, META, *dtypes, facts)
    if not all((facts.folder / part).is_dir() for part in facts.needs):
        family.tokenizers = published_words(family)
    return family


def frozen_bytes(part: nn.Module) -> int:
    """Bytes of a part's parameters that do not learn, and of its buffers."""
    still = [p for p in part.parameters() if not p.requires_grad]
    return sum(tensor.untyped_storage().nbytes() for tensor in [*still, *part.buffers()])


@lru_cache(8)
def _caption(family: _Same, facts: _Same) -> dict[str, Tensor]:
    """One caption as the cache gives it, whose shapes are those of all steps of a model."""
    with Meter(), Kernels():  # whose memory of shapes makes it faster
        found: dict[str, Tensor] = family.value.encode_prompts([""])
    return found


@dataclass(frozen=True)
class Taken:
    """What a meter told of one step; the words are those of `Cost`."""

    flops: Amount
    recomputed: Amount
    kept: Amount
    peaks: tuple[Amount, ...]
    encode_flops: Amount
    encode_peaks: tuple[Amount, ...]


SAMPLES = 251
"""The micro-batch of a rehearsal: a prime that divides no side of a model or of a latent. So what it divides
grows with the samples, and one rehearsal tells of micro-batches of any size."""


def rehearse(stage: Stage, size: tuple[int, int]) -> Taken:
    """One step with pictures of `size` (height, width) pixels."""
    held = [*stage.parts.parameters(), *stage.parts.buffers()]
    for part in stage.outside(*stage.encodes).values():
        held += [*part.parameters(), *part.buffers()]
    kernels, kept = Kernels(stage.lower), dict[int, Amount]()
    with kernels:
        text = stage.text_of(SAMPLES)
    with Meter(held, SAMPLES) as meter, kernels:
        batch = stage.batch(size, SAMPLES, text)
        for rows in (text or {}).values():
            meter.number(rows)  # a part of the batch, and no new memory where it is used
        del text
        latents, condition = stage.method.encode(batch)
        encoded, encode_flops = meter.now(), meter.flops
        with meter.keeping(kept, stage.selective):
            loss = loss_of(stage, kernels, latents, condition, batch.draws)
        del batch, latents, condition  # which the loop has in its forward pass only
        meter.backward(loss, stage.parts.parameters())
    stage.parts.zero_grad(set_to_none=True)
    return Taken(
        flops=meter.flops - encode_flops,
        recomputed=meter.recomputed,
        kept=sum(kept.values(), Amount()),
        peaks=meter.peaks(),
        encode_flops=encode_flops,
        encode_peaks=meter.peaks(encoded),
    )


def loss_of(stage: Stage, kernels: Kernels, latents: Tensor, condition: Condition, draws: Draws) -> Tensor:
    """The loss of a micro-batch as the loop has it."""

    def ask(x_t: Tensor, t: Tensor) -> Tensor:
        with kernels.autocast():
            answer: Tensor = stage.parts(x_t, t, condition)
        return answer

    return stage.objective.losses(ask, latents, draws).sum()

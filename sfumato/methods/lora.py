"""LoRA: small matrices beside a model's layers learn, and the layers stay (arXiv:2106.09685)."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato import config, models
from sfumato.errors import UserError
from sfumato.methods.joined import join
from sfumato.methods.method import Method, Trained
from sfumato.models import quantized
from sfumato.models.family import Family
from sfumato.models.folder import Facts
from sfumato.models.hub import is_hub_id
from sfumato.models.loading import peft_library, quiet
from sfumato.models.parts import Parts
from sfumato.models.texts import bare

NAME = "default"
"""peft's name for an adapter; it stands in the parameters' names."""


class LoRA(Method):
    """The denoiser, and the text encoders if asked, with adapters in their layers; they alone learn."""

    def __init__(self, family: Family, config: config.Config) -> None:
        """Raises UserError if peft is not there, or the targets match no layer."""
        super().__init__(family, config)
        assert config.method.kind == "lora", f"a run of {config.method.kind}"
        self.rule = config.method
        self.peft = peft_library('method.kind = "lora"')
        if self.rule.base_bits is not None:
            quantized.library(f"method.base_bits = {self.rule.base_bits}")
        self.targets = self.find_targets()

    @classmethod
    def check(cls, config: config.Config, facts: Facts, captions: Iterable[str]) -> int:
        cpu, fp32 = torch.device("cpu"), torch.float32
        family = models.load(config.model, cpu, fp32, fp32, False, False)
        with torch.device("meta"):
            parts = cls(family, config).build()
        return sum(p.numel() for p in parts.parameters() if p.requires_grad)

    def find_targets(self) -> dict[str, list[str]]:
        """For each part the names of all layers that get an adapter.

        Raises UserError for a target without any, and for a part without any.
        """
        with torch.device("meta"):
            nets = {self.family.learns: self.family.build_denoiser(), **self.text_parts()}
        layers = {part: [*self.layers_of(part, net)] for part, net in nets.items()}
        found: dict[str, set[str]] = {part: set() for part in nets}
        for part, mine in layers.items():
            usual = self.family.lora_text_targets if part in self.text else self.family.lora_targets
            found[part].update(n for n in mine for t in self.rule.targets or usual if matches(t, part, n))
        for target in self.rule.targets:
            if not any(matches(target, part, name) for part, names in found.items() for name in names):
                ends = sorted({name_end(name) for mine in layers.values() for name in mine})
                near = difflib.get_close_matches(target, ends, 3, 0.3) or ends[:8]
                raise UserError(
                    f'method.targets = "{target}"',
                    f"no linear or convolution layer of {' or '.join(nets)} is called so",
                    f"their layers end in {', '.join(near)}, among others",
                )
        for part in (part for part, names in found.items() if not names):
            raise UserError(
                f"adapters in the {part}",
                f"method.targets = {list(self.rule.targets)} means none of its layers",
                f"name some of {', '.join(sorted({name_end(name) for name in layers[part]})[:8])}"
                + (", or unset method.text_encoders" if part in self.text else ""),
            )
        return {part: sorted(names) for part, names in found.items()}

    def layers_of(self, part: str, net: nn.Module) -> Iterator[str]:
        """The names of a part's layers that an adapter can change to any effect."""
        for name, layer in net.named_modules():
            unread = bare(name).startswith(self.family.unread(part))
            if isinstance(layer, nn.Linear | nn.Conv2d) and not unread:
                yield name

    def settings(self, part: str) -> Any:
        """peft's settings for a part."""
        rule = self.rule
        return self.peft.LoraConfig(
            r=rule.rank,
            lora_alpha=rule.rank if rule.alpha is None else rule.alpha,
            target_modules=self.targets[part],
            lora_dropout=rule.dropout,
            use_dora=rule.dora,
            use_rslora=rule.rslora,
        )

    def build(self) -> Parts:
        """The parts from their config files with adapters, holding random numbers."""
        nets: dict[str, Any] = {self.family.learns: self.family.build_denoiser(), **self.text_parts()}
        for part, net in nets.items():
            net.requires_grad_(False)
            net.add_adapter(self.settings(part), NAME)
        return self.assembled(**nets)

    def settle(self, parts: Parts) -> None:
        """Put the frozen layers into few bits, if asked, and adapters into one operator with the last sum."""
        join(parts, NAME)
        if self.rule.base_bits is not None:
            quantized.quantize(parts, self.rule.base_bits)

    def source_name(self, name: str) -> str:
        """peft puts a layer into another one, as its base_layer."""
        return name.replace(".base_layer.", ".")

    def draw(self, seed: int) -> dict[str, Tensor]:
        """The adapters' start: A is drawn, B is 0, and DoRA's lengths are those of the layers."""
        with torch.device("meta"):
            parts = self.build()
        random = torch.Generator().manual_seed(seed)
        return {
            name: self.start_of(name, tuple(p.shape), random)
            for name, p in parts.named_parameters()
            if p.requires_grad
        }

    def start_of(self, name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        """The first numbers of one adapter's tensor."""
        if ".lora_magnitude_vector." in name:
            layer = self.base_weight(name.split(".lora_magnitude_vector.")[0] + ".weight")
            return layer.float().flatten(1).norm(dim=1).view(shape)
        if ".lora_A." not in name:
            return torch.zeros(shape)
        if self.rule.init == "gaussian":
            return torch.randn(shape, generator=random) / self.rule.rank
        # torch's own start of a linear layer, which peft takes over: uniform, variance 1 / (3 x inputs).
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return (torch.rand(shape, generator=random) * 2 - 1) * bound

    def export(self, trained: Trained, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """A file for diffusers' load_lora_weights, and kohya.safetensors for ComfyUI and A1111."""
        told: dict[str, Any] = {}
        whole: dict[str, Tensor] = {}
        for part in self.targets:
            # peft writes no name of the adapter, and DoRA's lengths without the name of the tensor, which
            # transformers asks for.
            ending = "" if part not in self.text else ".weight"
            mine = {
                re.sub(
                    r"(lora_magnitude_vector)\.weight$", rf"\1{ending}", name.replace(f".{NAME}", "")
                ): numbers
                for name, numbers in trained.items()
                if name.startswith(f"{part}.")
            }
            mine = {name: numbers.to(dtype).contiguous() for name, numbers in mine.items()}
            whole |= mine
            told[f"{part}_lora_layers"] = {name.removeprefix(f"{part}."): t for name, t in mine.items()}
            settings = json.loads(json.dumps(self.settings(part).to_dict(), default=sorted))
            told[f"{part}_lora_adapter_metadata"] = {
                name: value for name, value in settings.items() if value is not None
            }
        with quiet():
            self.family.pipeline.save_lora_weights(folder, **told, safe_serialization=True)
        base = self.family.model.weights
        facts = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rule.rank),
            "ss_network_alpha": str(self.kohya_alpha()),
            "ss_base_model": base if is_hub_id(base) and not Path(base).is_dir() else Path(base).name,
            "ss_resolution": str(self.config.data.resolution),
            "ss_base_model_version": self.family.facts.family,
        }
        if self.config.data.prompt is not None:
            facts["modelspec.trigger_phrase"] = self.config.data.prompt
        save_file(self.kohya(whole), folder / "kohya.safetensors", facts)

    def kohya(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under kohya's names, with the alpha that they ask for."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layer, kind = re.fullmatch(
                r"(.*)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name
            ).groups()  # type: ignore[union-attr]
            part, _, inner = layer.partition(".")
            key = f"{self.kohya_part(part)}_{bare(inner).replace('.', '_')}"
            ends = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
            if kind == "lora_magnitude_vector":
                # One length for each output: (out, 1), or (out, 1, 1, 1) of a convolution.
                tensor = tensor.reshape(-1, *[1] * (tensors[f"{layer}.lora_A.weight"].ndim - 1))
            found[f"{key}.{ends.get(kind, 'dora_scale')}"] = tensor
            found[f"{key}.alpha"] = torch.tensor(self.kohya_alpha(), dtype=tensor.dtype)
        return found

    def kohya_alpha(self) -> float:
        """The alpha that gives our scale where it is divided by the rank."""
        alpha = float(self.rule.rank if self.rule.alpha is None else self.rule.alpha)
        return alpha * math.sqrt(self.rule.rank) if self.rule.rslora else alpha

    def kohya_part(self, part: str) -> str:
        """What kohya's keys of a part begin with."""
        if part not in self.text:
            return "lora_unet"
        number = str(self.text.index(part) + 1) if len(self.text) > 1 else ""
        # Their layers are called as CLIP's checkpoints call them, whatever today's class does.
        return f"lora_te{number}_text_model"


def name_end(name: str) -> str:
    """The last word of a layer's name, with the one before it where that is a number."""
    words = name.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


def matches(target: str, part: str, name: str) -> bool:
    """Whether a target means a part's layer: a pattern of its whole name, or the end of it."""
    if target.startswith("re:"):
        return any(re.fullmatch(target[3:], whole) is not None for whole in (name, f"{part}.{name}"))
    return f".{part}.{name}".endswith(f".{target}")

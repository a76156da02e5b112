"""LoRA: small matrices beside the denoiser's layers learn, and the layers stay (arXiv:2106.09685)."""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato import config
from sfumato.errors import UserError
from sfumato.models.denoiser import prepare
from sfumato.models.family import Condition, Family
from sfumato.models.folder import weight_files
from sfumato.models.loading import peft_library, quiet

NAME = "default"
"""peft's name for an adapter; it stands in the parameters' names."""


class LoRA:
    """The denoiser with adapters in its layers; they alone require gradients."""

    def __init__(self, family: Family, config: config.Config) -> None:
        """Raises UserError if peft is not there, or the targets match no layer."""
        assert config.method.kind == "lora", f"a run of {config.method.kind}"
        self.family, self.engine, self.rule = family, config.engine, config.method
        self.peft = peft_library('method.kind = "lora"')
        self.targets = self.find_targets()

    def find_targets(self) -> list[str]:
        """The names of all layers that get an adapter. Raises UserError for a target without any."""
        with torch.device("meta"):
            net = self.family.build_denoiser()
        layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        found: set[str] = set()
        for target in self.rule.targets or self.family.lora_targets:
            mine = [name for name in layers if matches(target, name)]
            if not mine:
                ends = sorted({name_end(name) for name in layers})
                near = difflib.get_close_matches(target, ends, 3, 0.3) or ends[:8]
                raise UserError(
                    f'method.targets = "{target}"',
                    f"no linear or convolution layer of the {type(net).__name__} is called so",
                    f"its layers end in {', '.join(near)}, among others",
                )
            found.update(mine)
        return sorted(found)

    def settings(self) -> Any:
        """peft's settings."""
        rule = self.rule
        return self.peft.LoraConfig(
            r=rule.rank,
            lora_alpha=rule.rank if rule.alpha is None else rule.alpha,
            target_modules=self.targets,
            lora_dropout=rule.dropout,
            use_dora=rule.dora,
            use_rslora=rule.rslora,
        )

    def build(self) -> nn.Module:
        """The denoiser from its config file with adapters, holding random numbers."""
        net: Any = self.family.build_denoiser()
        net.requires_grad_(False)
        net.add_adapter(self.settings(), NAME)
        prepare(net, self.engine.attention, self.engine.gradient_checkpointing)
        return net

    def weights(self) -> list[Path]:
        """The denoiser's safetensors."""
        return weight_files(self.family.folder, self.family.learns, self.family.model.variant)

    def source_name(self, name: str) -> str:
        """peft puts a layer into another one, as its base_layer."""
        return name.replace(".base_layer.", ".")

    def draw(self, seed: int) -> dict[str, Tensor]:
        """The adapters' start: A is drawn, B is 0, and DoRA's lengths are those of the layers."""
        with torch.device("meta"):
            net = self.build()
        random = torch.Generator().manual_seed(seed)
        return {
            name: self.start_of(name, tuple(p.shape), random)
            for name, p in net.named_parameters()
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

    def base_weight(self, name: str) -> Tensor:
        """A tensor of the denoiser's files."""
        for file in self.weights():
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():
                    return tensors.get_tensor(name)
        raise AssertionError(f"{name} is in no file")

    def export(
        self,
        read: Callable[[str], Tensor],
        folder: Path,
        dtype: torch.dtype,
        process: Mapping[str, Any],
    ) -> None:
        """A file for diffusers' load_lora_weights, and kohya.safetensors for ComfyUI and A1111."""
        with torch.device("meta"):
            names = [name for name, p in self.build().named_parameters() if p.requires_grad]
        tensors = {name.replace(f".{NAME}", ""): read(name).to(dtype).contiguous() for name in names}
        # peft writes DoRA's lengths without the name of the tensor in its layer.
        tensors = {re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name): t for name, t in tensors.items()}
        settings = json.loads(json.dumps(self.settings().to_dict(), default=sorted))
        settings = {name: value for name, value in settings.items() if value is not None}
        parts = {f"{self.family.learns}_lora_layers": tensors}
        parts[f"{self.family.learns}_lora_adapter_metadata"] = settings
        with quiet():
            self.family.pipeline.save_lora_weights(folder, **parts, safe_serialization=True)
        facts = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rule.rank),
            "ss_network_alpha": str(self.kohya_alpha()),
            "ss_base_model": str(self.family.model.weights),
        }
        save_file(self.kohya(tensors), folder / "kohya.safetensors", facts)

    def kohya(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under kohya's names, with the alpha that they ask for."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layer, kind = re.fullmatch(
                r"(.*)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", name
            ).groups()  # type: ignore[union-attr]
            key = "lora_unet_" + layer.replace(".", "_")
            ends = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
            found[f"{key}.{ends.get(kind, 'dora_scale')}"] = tensor
            found[f"{key}.alpha"] = torch.tensor(self.kohya_alpha(), dtype=tensor.dtype)
        return found

    def kohya_alpha(self) -> float:
        """The alpha that gives our scale where it is divided by the rank."""
        alpha = float(self.rule.rank if self.rule.alpha is None else self.rule.alpha)
        return alpha * math.sqrt(self.rule.rank) if self.rule.rslora else alpha

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer, (B, c, h, w)."""
        return self.family.predict(net, x_t, t, condition)


def name_end(name: str) -> str:
    """The last word of a layer's name, with the one before it where that is a number."""
    words = name.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


def matches(target: str, name: str) -> bool:
    """Whether a target means a layer: a pattern of its whole name, or the end of it."""
    if target.startswith("re:"):
        return re.fullmatch(target[3:], name) is not None
    return name == target or name.endswith(f".{target}")

"""What a run wraps: the parts of a model that learn, and those that they learn through."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Ask = Callable[["Parts", Tensor, Tensor, Any], Tensor]


class Parts(nn.Module):
    """Modules under their names in the folder, asked together in one forward pass.

    One pass, because ZeRO 3 has a layer's weights at hand only within the forward pass of what it wraps.
    A parameter is called part.name: "unet.conv_in.weight".
    """

    def __init__(self, ask: Ask, parts: Mapping[str, nn.Module]) -> None:
        """ask: (these parts, x_t, t, condition) -> the answer."""
        super().__init__()
        self.ask = ask
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """The answer (B, c, h, w) to x_t (B, c, h, w) at timesteps t (B,) under a method's condition."""
        return self.ask(self, x_t, t, condition)

    def __getitem__(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def only(self, names: Any) -> dict[str, nn.Module]:
        """The parts of these names that are here."""
        return {name: part for name, part in self.named_children() if name in names}

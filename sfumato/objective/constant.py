"""A table that is made once and read on any device."""

import torch
from torch import Tensor


class Constant:
    """A constant tensor; it is copied to a device the first time that device asks for it."""

    def __init__(self, values: Tensor) -> None:
        self._copies: dict[torch.device, Tensor] = {values.device: values}

    def on(self, device: torch.device) -> Tensor:
        """The values on `device`."""
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]

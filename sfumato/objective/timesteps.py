"""The law that timesteps are drawn from."""

import torch
from torch import Tensor

from sfumato.config import BiasedTimesteps, UniformTimesteps
from sfumato.errors import UserError
from sfumato.objective.constant import Constant


class Law:
    """A law over the timesteps 0 .. number - 1; a draw is a pure function of a uniform number."""

    def __init__(self, settings: UniformTimesteps | BiasedTimesteps, number: int) -> None:
        self.weights = weights(settings, number)  # (number,) float64, sum 1
        cumulative = self.weights.cumsum(0).float()
        cumulative[-1] = 1
        self._cumulative = Constant(cumulative)

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniform numbers (B,) fp32 in [0, 1) -> timesteps (B,) int64, by the inverse of the distribution."""
        cumulative = self._cumulative.on(uniform.device)
        return torch.searchsorted(cumulative, uniform.contiguous(), right=True).clamp(max=len(cumulative) - 1)


def weights(settings: UniformTimesteps | BiasedTimesteps, number: int) -> Tensor:
    """The probability of each timestep, (number,) float64.

    The chosen part's weight is multiplied and the whole normalised (diffusers' generate_timestep_weights).
    Raises UserError if the part is empty or reaches past the schedule.
    """
    law = torch.ones(number, dtype=torch.float64)
    if isinstance(settings, BiasedTimesteps):
        begin, end = part(settings, number)
        law[begin:end] *= settings.multiplier
    return law / law.sum()


def part(settings: BiasedTimesteps, number: int) -> tuple[int, int]:
    """First and one past the last timestep of the part that is drawn more often."""
    if settings.kind == "range":
        if not settings.begin < settings.end <= number:
            raise UserError(
                f'objective.timesteps = "range" from {settings.begin} to {settings.end}',
                f"the schedule has the timesteps 0 to {number - 1}, and end is one past the last",
                f"choose begin < end <= {number}",
            )
        return settings.begin, settings.end
    count = int(settings.portion * number)
    if count == 0:
        raise UserError(
            f"objective.timesteps.portion = {settings.portion}",
            f"that is less than one of the schedule's {number} timesteps",
            f"choose at least {1 / number:g}",
        )
    return (0, count) if settings.kind == "earlier" else (number - count, number)

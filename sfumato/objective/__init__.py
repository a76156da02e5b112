"""What is learned: process x law of timesteps x weight. Pure functions of tensors; one loss per sample."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sfumato import config
from sfumato.data.batch import Draws
from sfumato.objective import weights
from sfumato.objective.constant import Constant
from sfumato.objective.process import Process, process_of
from sfumato.objective.timesteps import Law

Predict = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The training objective of one run, with no state but its tables.

    `scheduler_config` is the weights' own scheduler. Raises UserError where the settings do not fit it.
    """

    def __init__(self, settings: config.Objective, scheduler_config: Mapping[str, Any]) -> None:
        self.settings = settings
        self.process: Process = process_of(scheduler_config, settings.prediction, settings.zero_terminal_snr)
        self.law = Law(settings.timesteps, self.process.timesteps)
        self._weights = Constant(weights.table(settings.weight, self.process))

    def losses(self, predict: Predict, latents: Tensor, draws: Draws) -> Tensor:
        """Weighted mean squared error of each sample, (B,) float32.

        `predict` takes x_t (B, c, h, w) fp32 and t (B,) fp32 and answers (B, c, h, w) in any precision;
        latents are (B, c, h, w). All arithmetic outside `predict` is fp32.
        """
        latents = latents.float()
        t = self.law.draw(draws.timestep)  # (B,) int64
        noise = draws.noise + self.settings.noise_offset * draws.offset  # (B, c, h, w)
        x_t = self.process.add_noise(latents, self.disturbed(noise, draws), t)  # (B, c, h, w)
        prediction = predict(x_t, t.float()).float()
        target = self.process.target(latents, noise, t)
        # Broadcasting would turn a wrong shape into a wrong number.
        assert prediction.shape == target.shape, (
            f"predict gave {tuple(prediction.shape)}, wanted {tuple(target.shape)}"
        )
        return (prediction - target).square().flatten(1).mean(1) * self.weight(t)

    def disturbed(self, noise: Tensor, draws: Draws) -> Tensor:
        """The noise that the input is mixed with: not quite the target's under input perturbation."""
        if not self.settings.input_perturbation:
            return noise
        assert draws.perturbation is not None, "input_perturbation is set, but the batch has no draw for it"
        return noise + self.settings.input_perturbation * draws.perturbation

    def weight(self, t: Tensor) -> Tensor:
        """The factor of the loss at timesteps (B,) int64, (B,) float32."""
        return self._weights.on(t.device)[t]

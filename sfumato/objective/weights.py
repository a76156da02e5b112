"""How much the loss of each timestep counts."""

import torch
from torch import Tensor

from sfumato.config import MinSNRWeight, UniformWeight
from sfumato.objective.process import Prediction, Process


def table(settings: UniformWeight | MinSNRWeight, process: Process) -> Tensor:
    """The factor of every timestep's loss, (timesteps,) float32, finite also where there is no signal."""
    if isinstance(settings, MinSNRWeight):
        return min_snr(process.snr(), settings.gamma, process.prediction).float()
    return torch.ones(process.timesteps)


def min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """min(SNR, gamma) on the latents' error, turned into a factor on the target's (arXiv:2303.09556).

    The latents' squared error is that of epsilon / SNR, and that of v / (SNR + 1).
    """
    if prediction == "epsilon":
        # min(s, g) / s in the form that has its limit, 1, at s = 0.
        return gamma / snr.clamp(min=gamma)
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction == "v" else capped

"""From clean latents to noisy ones, and what the network is asked for: the tables and formulas of DDPM.

A `Process` is the seam for others (flow matching has the same verbs); the objective knows no more than this.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.objective.constant import Constant

Prediction = Literal["epsilon", "v", "sample"]

# What diffusers' scheduler_config.json calls the three targets.
DIFFUSERS_NAMES: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class Process(Protocol):
    """How noise is mixed in, and what the network predicts of the mixture."""

    timesteps: int
    prediction: Prediction

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents and noise (B, c, h, w), t (B,) int64 -> the noisy input (B, c, h, w)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network answers, (B, c, h, w)."""
        ...

    def snr(self) -> Tensor:
        """Signal power over noise power of every timestep, (timesteps,) float64 on the CPU."""
        ...

    def sampler_settings(self) -> dict[str, Any]:
        """The keys of scheduler_config.json that a sampler needs to agree with this training."""
        ...


class DDPM:
    """Variance-preserving diffusion in discrete steps (arXiv:2006.11239), read from a scheduler's config.

    `scheduler_config` is the dictionary of a diffusers scheduler_config.json; keys that it lacks take
    diffusers' own defaults. `prediction` "auto" takes the config's prediction_type. The schedule is rescaled
    to hold no signal at its last step (arXiv:2305.08891) if `zero_terminal_snr` or the config's
    rescale_betas_zero_snr says so. Raises UserError for a schedule or a target that DDPM does not have, and
    for epsilon together with a last step without signal.
    """

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        prediction: Literal["auto", "epsilon", "v", "sample"] = "auto",
        zero_terminal_snr: bool = False,
    ) -> None:
        refuse_other_processes(scheduler_config)
        self.prediction = resolve_prediction(scheduler_config, prediction)
        self.zero_terminal_snr = zero_terminal_snr or bool(scheduler_config.get("rescale_betas_zero_snr"))
        if self.zero_terminal_snr and self.prediction == "epsilon":
            theirs = "the weights' rescale_betas_zero_snr"
            who = "objective.zero_terminal_snr" if zero_terminal_snr else theirs
            raise UserError(
                f'{who} with prediction = "{prediction}"',
                "the target is epsilon, which says nothing at the last step: its input is the noise itself",
                'set objective.prediction = "v" (or "sample"), or leave the schedule as it is',
            )
        self.alphas_cumprod = torch.cumprod(1 - betas(scheduler_config), 0)  # (timesteps,) float64
        if self.zero_terminal_snr:
            self.alphas_cumprod = without_terminal_signal(self.alphas_cumprod)
        self.timesteps = len(self.alphas_cumprod)
        # Roots are taken in float64: near t = 0 the float32 difference 1 - alpha keeps only four digits.
        roots = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()])
        self._roots = Constant(roots.float())  # (2, timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) latents + sqrt(1 - a_t) noise.

        Latents and noise (B, c, h, w), t (B,) int64 in [0, timesteps).
        """
        signal, spread = self.scales(t, latents.ndim)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, the latents, or v = sqrt(a_t) noise - sqrt(1 - a_t) latents (arXiv:2202.00512)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        signal, spread = self.scales(t, latents.ndim)
        return signal * noise - spread * latents

    def snr(self) -> Tensor:
        """a_t / (1 - a_t) for every t, (timesteps,) float64; 0 at the last one of a rescaled schedule."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def scales(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each (B, 1, ..., 1) with `ndim` dimensions, float32 on t's device."""
        signal, spread = self._roots.on(t.device)[:, t].reshape(2, -1, *[1] * (ndim - 1))  # (2, B, 1, 1, 1)
        return signal, spread

    def sampler_settings(self) -> dict[str, Any]:
        """The keys of scheduler_config.json that a sampler needs to agree with this training."""
        names = {ours: theirs for theirs, ours in DIFFUSERS_NAMES.items()}
        settings: dict[str, Any] = {"prediction_type": names[self.prediction]}
        if self.zero_terminal_snr:
            # A sampler that does not start at the last step never meets the state without signal.
            settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings


def process_of(
    scheduler_config: Mapping[str, Any],
    prediction: Literal["auto", "epsilon", "v", "sample"],
    zero_terminal_snr: bool,
) -> Process:
    """The process that a scheduler's config belongs to: so far DDPM, or a UserError."""
    return DDPM(scheduler_config, prediction, zero_terminal_snr)


def refuse_other_processes(config: Mapping[str, Any]) -> None:
    """Raise UserError if the weights were trained with a process that is not DDPM's."""
    name = str(config.get("_class_name", ""))
    if name.startswith(("FlowMatch", "EDM")) or config.get("use_flow_sigmas"):
        raise UserError(
            f"training on the schedule of the weights' {name or 'scheduler'}",
            "it is not a DDPM schedule (epsilon, v or sample prediction over discrete steps)",
            "start from weights of the Stable Diffusion 1, 2 or XL line",
        )


def resolve_prediction(config: Mapping[str, Any], prediction: str) -> Prediction:
    """The target's name, from the setting or, for "auto", from the scheduler's config."""
    if prediction != "auto":
        assert prediction in DIFFUSERS_NAMES.values(), f"no target is called {prediction!r}"
        return cast(Prediction, prediction)
    name = config.get("prediction_type", "epsilon")
    if name not in DIFFUSERS_NAMES:
        raise UserError(
            'objective.prediction = "auto"',
            f"the weights' scheduler says prediction_type = {name!r}",
            'set objective.prediction = "epsilon", "v" or "sample" if these weights predict one of them',
        )
    return DIFFUSERS_NAMES[name]


def betas(config: Mapping[str, Any]) -> Tensor:
    """The noise added at each step, (timesteps,) float64: trained_betas, or what beta_schedule names."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    number = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if schedule == "linear":
        return torch.linspace(first, last, number, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, number, dtype=torch.float64) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, number, dtype=torch.float64)) * (last - first) + first
    if schedule in SIGNAL_CURVES:
        curve = SIGNAL_CURVES[schedule]
        signal = torch.tensor([curve(i / number) for i in range(number + 1)], dtype=torch.float64)
        # The cap keeps a curve that ends at zero from leaving a step without any signal.
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    known = ["linear", "scaled_linear", "sigmoid", *SIGNAL_CURVES]
    raise UserError(
        "training on the schedule of the weights' scheduler",
        f"its beta_schedule is {schedule!r}",
        f"use weights with one of {', '.join(known)}, or write trained_betas into scheduler_config.json",
    )


def cosine_signal(share: float) -> float:
    """Signal power left after this share of the steps (arXiv:2102.09672, equation 17)."""
    return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace_signal(share: float) -> float:
    """Signal power under a Laplace law of log-SNR, as diffusers has it (arXiv:2407.03297)."""
    from_middle = 0.5 - share
    log_snr = -0.5 * math.copysign(1, from_middle) * math.log(1 - 2 * abs(from_middle) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


SIGNAL_CURVES = {"squaredcos_cap_v2": cosine_signal, "laplace": laplace_signal}


def without_terminal_signal(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(a) so that the last is 0 and the first stays (arXiv:2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

"""What the network is asked, and how much each answer counts."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sfumato.config.section import Section, named


class UniformTimesteps(Section):
    """Every timestep is as likely as any other."""

    kind: Literal["uniform"] = "uniform"


class BiasedTimesteps(Section):
    """A part of the timesteps is drawn `multiplier` times as often (diffusers' timestep bias)."""

    kind: Literal["earlier", "later", "range"]
    multiplier: float = Field(1.0, gt=0)
    """How many times as likely the chosen part is."""
    portion: float = Field(0.25, gt=0, le=1)
    """Share of the timesteps, from the low-noise ("earlier") or high-noise ("later") end."""
    begin: int = Field(0, ge=0)
    """First timestep of "range"."""
    end: int = Field(1000, ge=1)
    """One past the last timestep of "range"."""


class UniformWeight(Section):
    """Every timestep's loss counts the same."""

    kind: Literal["uniform"] = "uniform"


class MinSNRWeight(Section):
    """min(SNR, gamma), divided as the prediction target asks (arXiv:2303.09556)."""

    kind: Literal["min_snr"]
    gamma: float = Field(5.0, gt=0)
    """The SNR above which a timestep counts less."""


class Objective(Section):
    """What the network is asked to predict, at which noise levels, and how much each counts."""

    prediction: Literal["auto", "epsilon", "v", "sample"] = "auto"
    """The target; "auto" is what the weights' own scheduler says."""
    timesteps: Annotated[UniformTimesteps | BiasedTimesteps, Field(discriminator="kind")] = UniformTimesteps()
    """The law that timesteps are drawn from."""
    weight: Annotated[UniformWeight | MinSNRWeight, Field(discriminator="kind")] = UniformWeight()
    """How much each timestep's loss counts."""
    noise_offset: float = Field(0.0, ge=0)
    """Adds this much noise that is constant over each latent channel."""
    input_perturbation: float = Field(0.0, ge=0)
    """Adds this much extra noise to the input but not to the target (arXiv:2301.11706)."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step holds no signal (arXiv:2305.08891), which counts for
    nothing under "min_snr"."""

    _named = field_validator("timesteps", "weight", mode="before")(named("uniform"))

    @model_validator(mode="after")
    def _terminal(self) -> "Objective":
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                'zero_terminal_snr with prediction = "epsilon" has nothing to learn at the last step, '
                'where the input is the noise itself; use prediction = "v" or "sample"'
            )
        return self

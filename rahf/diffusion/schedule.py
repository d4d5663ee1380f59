"""The noise schedule, the network's training target, and the steps of each sampler.

    x_t = sqrt(alpha_t) * x_0 + sqrt(1 - alpha_t) * noise,    alpha_t: `alphas_cumprod[t]`, t in [0, num_train_timesteps)

Every sampler here is a linear recurrence, x' = a x + b x_0 + c (x_0 of the step before) + d noise, with x_0 as predicted in
this step. `plan` computes the coefficients in float64, and one compiled loop runs any sampler (sample.py).
"""

import dataclasses
import functools
import typing
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from richhf_data import checked
from richhf_data.errors import UserError
from richhf_data.ranges import Range

Array = jax.Array
PREDICTIONS = ("epsilon", "v_prediction")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "linspace", "trailing")  # of the samplers' timesteps (arXiv 2305.08891, table 2)
SAMPLERS = ("ddim", "ddpm", "dpm++")
MIN_ALPHA = 1e-12  # with less of the image left, dividing by its share loses everything in float32
Beta = Annotated[float, Range(1e-7, 1, without=(1,))]  # 1 minus a smaller one is 1 in float32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise schedule, under diffusers' names. The defaults are those of Stable Diffusion 1.4 and 1.5."""

    num_train_timesteps: Annotated[int, Range(1, 100_000)] = 1000
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    beta_schedule: Literal[BETAS] = "scaled_linear"
    trained_betas: tuple[Beta, ...] | None = None  # all betas, in place of the three options above
    prediction_type: Literal[PREDICTIONS] = "epsilon"  # the noise, or v_prediction: the velocity (arXiv 2202.00512)
    timestep_spacing: Literal[SPACINGS] | None = "leading"  # None: "linspace" for dpm++, "leading" for the others
    steps_offset: Annotated[int, Range(0, 100_000)] = 1  # added to timesteps with "leading"
    set_alpha_to_one: bool = False  # DDIM's last step goes to alpha = 1, not to `alphas_cumprod[0]`
    unsupported: tuple[tuple[str, str], ...] = ()  # sampler, an option of diffusers' that ours does not have

    def __post_init__(self):
        checked.fields(self, "schedule")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"schedule.trained_betas: got {len(self.trained_betas)}, expected num_train_timesteps = "
                f"{self.num_train_timesteps} of them"
            )
        if self.alphas_cumprod[-1] < MIN_ALPHA:
            raise UserError(
                f"schedule.beta_end: got {self.beta_end} with {self.num_train_timesteps} timesteps of {self.beta_schedule}, "
                f"expected betas that leave a share of the image of at least {MIN_ALPHA}"
            )

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """float64[num_train_timesteps], falling: the share of the image in the variance."""
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, count)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        else:  # arXiv 2102.09672
            bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        return np.cumprod(1 - betas)

    def _weights(self, timesteps: Array) -> tuple[Array, Array]:
        alpha = jnp.asarray(self.alphas_cumprod, jnp.float32)[timesteps].reshape(-1, 1, 1, 1)
        return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)

    def add_noise(self, x0: Array, noise: Array, timesteps: Array) -> Array:
        """x_t, float32[B, h, w, Z]. x0, noise: float32[B, h, w, Z]. timesteps: int32[B], or int32[] for all."""
        signal, sigma = self._weights(timesteps)
        return signal * x0 + sigma * noise

    def target(self, x0: Array, noise: Array, timesteps: Array) -> Array:
        """What the network should predict for `add_noise` with the same arguments, float32[B, h, w, Z]."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._weights(timesteps)
        return signal * noise - sigma * x0

    def x0(self, x: Array, prediction: Array, alpha: Array) -> Array:
        """The image's latents according to a prediction for x. alpha: float32[], `alphas_cumprod` at the timestep of x."""
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        return (x - sigma * prediction) / signal if self.prediction_type == "epsilon" else signal * x - sigma * prediction


class Plan(typing.NamedTuple):
    """A sampler's n steps; each field is [n]. A step is

    x_next = x * x_t + x0 * x_0 + x0_before * (x_0 of the step before) + noise * (standard normal noise)
    """

    timesteps: np.ndarray  # int32, falling
    alpha: np.ndarray  # float32, like the rest: `alphas_cumprod` before the step
    alpha_next: np.ndarray  # at the next timestep; 1 after the last
    reached: np.ndarray  # after the step; DDIM's need not be the next timestep's
    x: np.ndarray
    x0: np.ndarray
    x0_before: np.ndarray
    noise: np.ndarray


def plan(schedule: Schedule, sampler: str, steps: int, strength: float = 1.0, eta: float = 0.0) -> Plan:
    """The steps of a sampler, as diffusers' scheduler of it takes them.

    Args:
      sampler: "ddim" (arXiv 2010.02502), "ddpm" (arXiv 2006.11239, the smaller variance), or "dpm++", the
        second-order multistep DPM-Solver++ (arXiv 2211.01095) with first-order first and last steps.
      steps: from pure noise to the image.
      strength: only the last int(steps * strength) steps are taken.
      eta: of DDIM: 0 adds no noise; 1 adds as much as the smaller variance of DDPM.

    Raises:
      UserError: an unknown sampler, one for which the schedule has an unsupported option, more steps than timesteps, a
        strength that leaves no step.
    """
    count = schedule.num_train_timesteps
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: got {sampler!r}, expected one of {SAMPLERS}")
    if found := [option for name, option in schedule.unsupported if name == sampler]:
        raise UserError(f"sampler: {sampler} does not support the scheduler's option {found[0]}; choose another sampler")
    spacing = schedule.timestep_spacing or ("linspace" if sampler == "dpm++" else "leading")
    spaces = steps + (sampler == "dpm++" and spacing != "trailing")
    possible = 0 < steps <= spaces <= count
    timesteps = _timesteps(spacing, count, spaces, schedule.steps_offset)[:steps] if possible else None
    if not possible or timesteps[0] >= count:
        raise UserError(
            f"steps: got {steps} for {sampler}, expected at least 1 and fewer than schedule.num_train_timesteps = {count}"
        )
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise UserError(
            f"strength: got {strength} for {steps} steps, expected above 0 and at most 1, with at least one step left; "
            f"raise it to {1 / steps:.3g} or take more steps"
        )
    timesteps = timesteps[steps - int(steps * strength) :]
    alphas = schedule.alphas_cumprod
    alpha = alphas[timesteps]
    alpha_next = np.append(alpha[1:], 1.0)
    zeros = np.zeros(len(timesteps))
    to = alpha_next
    if sampler == "dpm++":
        coefficients = _dpm(alpha, alpha_next)
    elif sampler == "ddim":
        previous = timesteps - count // steps  # not always the next timestep
        last = 1.0 if schedule.set_alpha_to_one else alphas[0]
        to = np.where(previous >= 0, alphas[np.maximum(previous, 0)], last)
        variance = eta**2 * (1 - to) / (1 - alpha) * (1 - alpha / to)
        x = np.sqrt((1 - to - variance) / (1 - alpha))
        coefficients = x, np.sqrt(to) - x * np.sqrt(alpha), zeros, np.sqrt(variance)
    else:
        beta = 1 - alpha / to  # the variance that this step removes
        x, x0 = np.sqrt(alpha / to) * (1 - to) / (1 - alpha), np.sqrt(to) * beta / (1 - alpha)
        coefficients = x, x0, zeros, np.sqrt((1 - to) / (1 - alpha) * beta)
    return Plan(timesteps.astype(np.int32), *(c.astype(np.float32) for c in (alpha, alpha_next, to, *coefficients)))


def _timesteps(spacing: str, count: int, steps: int, offset: int) -> np.ndarray:
    """int64[steps], falling: timesteps of `count`."""
    if spacing == "leading":
        return np.arange(steps)[::-1] * (count // steps) + offset
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    return np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1


def _dpm(alpha, to):
    """The coefficients of DPM-Solver++(2M) for steps from `alpha` to `to`. The last `to` is 1."""
    signal, sigma, signal_to, sigma_to = np.sqrt(alpha), np.sqrt(1 - alpha), np.sqrt(to), np.sqrt(1 - to)
    with np.errstate(divide="ignore"):
        h = np.log(signal_to / sigma_to) - np.log(signal / sigma)  # infinite in the last step
    first_order = -signal_to * np.expm1(-h)
    # Second order: the slope of x_0 over the step before. The first step does not know it; the last does not use it.
    slope = np.zeros(len(h))
    slope[1:-1] = first_order[1:-1] * 0.5 * h[1:-1] / h[:-2]
    return sigma_to / sigma, first_order + slope, -slope, np.zeros(len(h))

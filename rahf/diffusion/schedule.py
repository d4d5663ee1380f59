"""The noise schedule, the network's training target, and the steps of each sampler.

    x_t = sqrt(alpha_t) * x_0 + sqrt(1 - alpha_t) * noise,    alpha_t: `alphas_cumprod[t]`, t in [0, num_train_timesteps)

Every sampler here is a linear recurrence, x' = a x + b x_0 + c (x_0 of the step before) + d noise, with x_0 as predicted in
this step. `plan` computes the coefficients in float64, and one compiled loop runs any sampler (sample.py).
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from richhf_data.errors import UserError

Array = jax.Array
PREDICTIONS = ("epsilon", "v_prediction")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SAMPLERS = ("ddim", "ddpm", "dpm++")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise schedule, under diffusers' names. The defaults are those of Stable Diffusion 1.4 and 1.5."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"  # the noise, or v_prediction: the velocity (arXiv 2202.00512)
    steps_offset: int = 1  # added to the samplers' timesteps
    set_alpha_to_one: bool = False  # DDIM's last step goes to alpha = 1, not to `alphas_cumprod[0]`

    def __post_init__(self):
        for name, allowed in (("beta_schedule", BETAS), ("prediction_type", PREDICTIONS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"schedule.{name}: got {getattr(self, name)!r}, expected one of {allowed}")

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """float64[num_train_timesteps], falling: the share of the image in the variance."""
        count = self.num_train_timesteps
        if self.beta_schedule == "linear":
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
    x: np.ndarray
    x0: np.ndarray
    x0_before: np.ndarray
    noise: np.ndarray


def plan(schedule: Schedule, sampler: str, steps: int, strength: float = 1.0) -> Plan:
    """The steps of a sampler. Their spacing is diffusers' "leading", as in Stable Diffusion's configurations.

    diffusers' DPMSolverMultistepScheduler uses "linspace" instead if a configuration names no spacing.

    Args:
      sampler: "ddim" (arXiv 2010.02502, eta = 0), "ddpm" (arXiv 2006.11239, the smaller variance), or "dpm++", the
        second-order multistep DPM-Solver++ (arXiv 2211.01095) with first-order first and last steps.
      steps: from pure noise to the image.
      strength: only the last int(steps * strength) steps are taken.

    Raises:
      UserError: an unknown sampler, more steps than timesteps, a strength that leaves no step.
    """
    count = schedule.num_train_timesteps
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: got {sampler!r}, expected one of {SAMPLERS}")
    spaces = steps + (sampler == "dpm++")
    ratio = count // spaces if steps > 0 else 0
    timesteps = np.arange(spaces)[::-1][:steps] * ratio + schedule.steps_offset
    if steps < 1 or ratio < 1 or timesteps[0] >= count:
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
    if sampler == "dpm++":
        coefficients = _dpm(alpha, alpha_next)
    else:
        previous = timesteps - ratio
        last = 1.0 if sampler == "ddpm" or schedule.set_alpha_to_one else alphas[0]
        to = np.where(previous >= 0, alphas[np.maximum(previous, 0)], last)
        zeros = np.zeros(len(timesteps))
        if sampler == "ddim":
            x = np.sqrt((1 - to) / (1 - alpha))
            coefficients = x, np.sqrt(to) - x * np.sqrt(alpha), zeros, zeros
        else:
            beta = 1 - alpha / to  # the variance that this step removes
            x, x0 = np.sqrt(alpha / to) * (1 - to) / (1 - alpha), np.sqrt(to) * beta / (1 - alpha)
            coefficients = x, x0, zeros, np.sqrt((1 - to) / (1 - alpha) * beta)
    return Plan(timesteps.astype(np.int32), *(c.astype(np.float32) for c in (alpha, alpha_next, *coefficients)))


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

"""Universal guidance (arXiv 2302.07121): a differentiable score of the picture steers the sampler.

With x_0 the clean latents that a step predicts from its latents x, decode the VAE's decoder, alpha the step's share of the
image in the variance, and f the score, a guided step replaces x_0 with

    x_0 + scale (1 - alpha) / sqrt(alpha) df(decode(x_0(x)))/dx     forward: the gradient passes through the UNet
        + delta                                                     backward: `backward_steps` steps uphill from x_0,
                                                                    delta += backward_rate df(decode(x_0 + delta))/d delta

The paper writes the same as changes of the predicted noise, with -f as its loss: forward adds scale sqrt(1 - alpha) d(-f)/dx
to it, backward subtracts sqrt(alpha / (1 - alpha)) delta. With `recurrence` = k, a guided step is taken k times; between
two of them its result is noised again to the step's level.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from rahf.diffusion.schedule import Plan
from rahf.reward.differentiable import Differentiable
from richhf_data import checked, ranges
from richhf_data.errors import UserError

Array = jax.Array
SCALE = ranges.Range(-1e9, 1e9)
TIMES = ranges.Range(1, 1000, whole=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """What guides, how strongly, and when.

    Attributes:
      score: to be raised. scale: of forward guidance; a negative one lowers the score.
      backward_steps, backward_rate: of backward guidance. recurrence: times that a guided step is taken.
      start, end: the share of the taken steps where guidance begins and ends, 0 to 1.
    """

    score: Differentiable
    scale: Annotated[float, SCALE] = 1.0
    backward_steps: Annotated[int, ranges.NUMBER] = 0
    backward_rate: Annotated[float, ranges.POSITIVE] = 1.0
    recurrence: Annotated[int, TIMES] = 1
    start: Annotated[float, ranges.SHARE] = 0.0
    end: Annotated[float, ranges.SHARE] = 1.0

    def __post_init__(self):
        checked.fields(self, "guide")
        if not self.start < self.end:
            raise UserError(f"guide: got start {self.start} and end {self.end}, expected a start before the end")

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return self.scale != 0 or self.backward_steps > 0 or self.recurrence > 1

    def active(self, steps: int) -> np.ndarray:
        """bool[steps]: the guided steps. Raises UserError if there are none."""
        places = np.arange(steps) / steps
        found = (places >= self.start) & (places < self.end)
        if not found.any():
            raise UserError(f"guide: got start {self.start} and end {self.end} of {steps} steps, expected one step or more")
        return found

    @property
    def form(self) -> "Form":
        """The part that a program is compiled for."""
        forward = self.scale != 0
        return Form(self.score.score, forward, self.backward_steps, self.recurrence, self.start == 0 and self.end == 1)


@dataclasses.dataclass(frozen=True)
class Form:
    """What the compiled program depends on; see `Guidance`.

    always: every step is guided.
    """

    score: Callable[[Any, Array, Any], Array]
    forward: bool
    backward_steps: int
    recurrence: int
    always: bool


@dataclasses.dataclass(frozen=True)
class Guide:
    """`Guidance` inside of the compiled program.

    Attributes:
      form: what is compiled. score: latents [B, h, w, Z] -> [B].
      scale, rate: float32[]. active: bool[steps].
    """

    form: Form
    score: Callable[[Array], Array]
    scale: Array
    rate: Array
    active: Array

    @functools.cached_property
    def uphill(self) -> Callable[[Array], Array]:
        """Latents [B, h, w, Z] -> the gradient of each picture's score, of the same shape."""
        return jax.grad(lambda latents: self.score(latents).sum())

    def clean(self, predict: Callable[[Array], Array], x: Array, alpha: Array) -> tuple[Array, Array]:
        """The guided x_0 of a step, and the largest gradient, float32[].

        Args:
          predict: x -> x_0, both [B, h, w, Z]. alpha: float32[].
        """
        if self.form.forward:
            x0, back = jax.vjp(predict, x)
        else:
            x0 = predict(x)
        if not (self.form.forward or self.form.backward_steps):
            return x0, jnp.zeros(())
        slope = self.uphill(x0)
        guided, largest = x0, jnp.max(jnp.abs(slope))
        if self.form.forward:
            (gradient,) = back(slope)
            guided = guided + self.scale * (1 - alpha) / jnp.sqrt(alpha) * gradient
        if self.form.backward_steps:
            delta = self.rate * slope
            further = lambda _, delta: delta + self.rate * self.uphill(x0 + delta)  # noqa: E731
            guided = guided + jax.lax.fori_loop(1, self.form.backward_steps, further, delta)
        return guided, largest


def noised_again(x: Array, now: Plan, noise: Array) -> Array:
    """Latents after a step, at the noise level before it."""
    kept = now.alpha / now.reached
    return jnp.sqrt(kept) * x + jnp.sqrt(1 - kept) * noise


def check_gradient(largest: np.ndarray, active: np.ndarray, scale: float) -> None:
    """Refuses a score without a gradient, which guides nowhere.

    Args:
      largest: float32[steps], the largest gradient of each step. active: bool[steps].
    """
    if not largest[active].any():
        raise UserError(
            f"guide: the gradient of the score is 0 in all {active.sum()} guided steps (scale {scale:g}); a constant or "
            "saturated score cannot guide: choose another score"
        )

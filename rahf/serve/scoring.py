"""What the service computes of a batch: the critic's feedback, and any further rewards."""

import dataclasses
import math
import traceback
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm.auto import tqdm

from rahf import predict, predictor
from rahf.reward import specs
from richhf_data import schema
from richhf_data.errors import UserError

CRITIC = "rahf"  # the name of the critic among the rewards
_FILLED = 0.75  # of a batch: the rest is computed for nothing


@dataclasses.dataclass
class Row:
    """A picture of a request on its way through the queue.

    Attributes:
      inputs: of `Predictor.begin`. prompt: its prompt. picture: uint8[H, W, 3] where `rewards` names any.
      rewards: the names of those that are asked for.
      future: gets the outcome: an item of rahf/report.py without its image, with `rewards` {name: number} and `errors`
        {name: reason}; or an exception.
    """

    inputs: dict
    prompt: str
    picture: np.ndarray | None
    rewards: Sequence[str]
    future: object


class Scorer:
    """A critic and rewards, compiled for a few batch sizes.

    Args:
      model: the critic. rewards: name -> reward.
      sizes: of batches, ascending; each is rounded up to the devices.
    """

    def __init__(self, model: predictor.Model, rewards: Mapping[str, Callable], sizes: Sequence[int]):
        self.model = model
        self.sizes = sorted({model.predictor.batch_size(size) for size in sizes})
        # A sum of scores of the same critic needs no second forward pass.
        self._of_critic = {
            name: reward
            for name, reward in rewards.items()
            if isinstance(reward, specs.ScoreReward) and reward.model.identity == model.identity
        }
        self.rewards = {name: reward for name, reward in rewards.items() if name not in self._of_critic}
        self.names = [*rewards]

    @property
    def most(self) -> int:
        """Rows of the largest batch."""
        return self.sizes[-1]

    def take(self, waiting: int) -> int:
        """How many of the rows that wait make a batch: all, if they nearly fill a size; else what fills a smaller one."""
        larger = next((size for size in self.sizes if size >= waiting), self.most)
        fills = [size for size in self.sizes if size <= waiting]
        return min(waiting, larger) if waiting >= _FILLED * larger or not fills else fills[-1]

    def compile(self) -> None:
        """Compiles every size by predicting an empty picture, the largest first."""
        side = self.model.model_config.image_size
        image = np.zeros((side, side, 3), np.uint8)
        row = Row(self.model.prepare(image, "a"), "a", image, [*self.rewards], None)
        for size in tqdm(self.sizes[::-1], desc="compile", unit="batch size", dynamic_ncols=True):
            for outcome in self.finish(self.begin([row] * size)):
                if isinstance(outcome, Exception):
                    raise outcome
                for name, reason in outcome["errors"].items():
                    raise UserError(f"reward: {name}: {reason}")

    def begin(self, rows: Sequence[Row]):
        """Hands a batch to the devices; does not wait for them."""
        size = self._size(len(rows))
        return rows, self.model.predictor.begin(self.model.params, [row.inputs for row in rows], size)

    def finish(self, begun) -> list[dict | Exception]:
        """The outcomes of the rows that `begin` was given."""
        rows, outputs = begun
        found = self.model.predictor.finish([f"picture {i}" for i in range(len(rows))], outputs)
        outcomes = [
            predict.item_of(self.model, {"prompt": row.prompt}, one) | {"rewards": {}, "errors": {}}
            for row, one in zip(rows, found, strict=True)
        ]
        for name, reward in self._of_critic.items():
            values = reward.of_feedback(predictor.feedback_of(found, [row.prompt for row in rows], self.model))
            for row, outcome, value in zip(rows, outcomes, values, strict=True):
                if name in row.rewards:
                    outcome["rewards"][name] = float(value)
        for name, reward in self.rewards.items():
            wanted = [i for i, row in enumerate(rows) if name in row.rewards]
            for i, value in zip(wanted, self._values(reward, [rows[i] for i in wanted]), strict=True):
                outcomes[i]["errors" if isinstance(value, str) else "rewards"][name] = value
        return outcomes

    def _values(self, reward: Callable, rows: Sequence[Row]) -> list[float | str]:
        """The reward of each row, or the reason why there is none. One bad picture does not spoil the others."""
        if not rows:
            return []
        padded = [*rows, *[rows[-1]] * (self._size(len(rows)) - len(rows))]  # a few shapes, as they may be compiled
        try:
            values = specs.checked(reward, [row.picture for row in padded], [row.prompt for row in padded])
            return [float(value) for value in values[: len(rows)]]
        except Exception as error:
            if len(rows) > 1:
                return [self._values(reward, [row])[0] for row in rows]
            if isinstance(error, UserError):
                return [str(error)]
            traceback.print_exception(error)
            return ["a fault of the reward; the service's log has the reason"]

    def _size(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)


def named_rewards(given: Sequence[str]) -> dict[str, Callable]:
    """name -> reward, see `specs.named`. Raises UserError also for a name that the critic's scores have."""
    return {name: specs.reward_of(spec) for name, spec in specs.named(given, (CRITIC, *schema.SCORES)).items()}


def answer_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """name -> weight of "overall" or "alignment=0.7,plausibility=0.3".

    Args:
      names: that may occur.

    Raises:
      UserError: another name, a name twice, a weight that is not a finite number.
    """
    weights = {}
    for term in text.split(","):
        name, equals, weight = term.partition("=")
        if name not in names or name in weights:
            raise UserError(f"answer: got {name!r} in {text!r}, expected some of {', '.join(names)}, each once")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"answer: got {weight!r} times {name}, expected a number")
    return weights

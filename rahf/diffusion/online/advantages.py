"""From the rewards of a round's pictures to their advantages: how much better each is than what was to be expected."""

import dataclasses

import numpy as np

from richhf_data.errors import UserError

LEAST = 1e-6  # deviations are divided by with this much added


@dataclasses.dataclass(frozen=True)
class History:
    """The newest rewards of each prompt, for DDPO.

    Attributes:
      rewards: float32[prompts, n], the newest ones last. count: int32[prompts], how many of them there are, up to n.
    """

    rewards: np.ndarray
    count: np.ndarray

    @classmethod
    def empty(cls, prompts: int, size: int) -> "History":
        return cls(np.zeros((prompts, size), np.float32), np.zeros(prompts, np.int32))

    def with_rewards(self, prompts: np.ndarray, rewards: np.ndarray) -> "History":
        """The history with the rewards of some pictures, float32[n], of these prompts, int[n]."""
        kept, count = self.rewards.copy(), self.count.copy()
        for prompt, reward in zip(prompts, rewards, strict=True):
            kept[prompt] = np.append(kept[prompt, 1:], reward)
            count[prompt] = min(count[prompt] + 1, kept.shape[1])
        return History(kept, count)


def of_prompts(prompts: np.ndarray, rewards: np.ndarray, history: History) -> np.ndarray:
    """DDPO's advantages, float32[n]: the reward less its prompt's mean, by its prompt's deviation.

    A prompt with less than half of a history takes mean and deviation of this round.

    Args:
      prompts: int[n]. rewards: float32[n]. history: with these rewards.
    """
    rewards = np.asarray(rewards, np.float64)
    found = (rewards - rewards.mean()) / (rewards.std() + LEAST)
    for row, prompt in enumerate(prompts):
        if (count := history.count[prompt]) * 2 >= history.rewards.shape[1]:
            own = history.rewards[prompt, -count:].astype(np.float64)
            found[row] = (rewards[row] - own.mean()) / (own.std() + LEAST)
    return found.astype(np.float32)


def of_groups(groups: np.ndarray, rewards: np.ndarray) -> tuple[np.ndarray, int]:
    """GRPO's advantages, float32[n]: the reward less its group's mean, by its group's deviation; 0 in a group of equals.

    Args:
      groups: int[n], the group of each. rewards: float32[n].

    Returns:
      The advantages, and the number of groups whose rewards are all equal.
    """
    rewards, found, equal = np.asarray(rewards, np.float64), np.zeros(len(rewards)), 0
    for group in np.unique(groups):
        rows = groups == group
        own = rewards[rows]
        if np.ptp(own) == 0:
            equal += 1
        else:
            found[rows] = (own - own.mean()) / (own.std() + LEAST)
    return found.astype(np.float32), equal


def regional(advantages: np.ndarray, heatmaps: np.ndarray, weight: float) -> np.ndarray:
    """The advantages of regions, float32[n, h, w]; their mean over a picture is its advantage.

    A region with less of a flaw than its picture's mean has more advantage. What the heatmaps add deviates by `weight` over
    the round.

    Args:
      advantages: float32[n]. heatmaps: float32[n, h, w], of flaws.
    """
    better = heatmaps.mean((1, 2), keepdims=True, dtype=np.float64) - heatmaps
    return (advantages[:, None, None] + weight * better / (better.std() + LEAST)).astype(np.float32)


def check(rewards: np.ndarray, first: bool) -> None:
    """Refuses rewards that are all equal in the first round.

    Raises:
      UserError: so.
    """
    if first and np.ptp(rewards) == 0:
        raise UserError(
            f"reward: got {rewards[0]:.6g} for all {len(rewards)} pictures of the first round, expected different ones; "
            "equal rewards teach nothing: take another reward, or more --config.policy.pictures"
        )

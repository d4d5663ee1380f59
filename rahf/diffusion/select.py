"""Selects the best picture of each prompt by a reward: paper A's data for fine-tuning a generator on its own pictures.

    python -m rahf.diffusion.sample --model=DIR --prompts=prompts.txt --num_images=8 --output=own
    python -m rahf.diffusion.select --images=own --reward=rahf:DIR:plausibility --threshold=0.8 --output=selected
    python -m rahf.diffusion.train --config=sd_selected --workdir=tuned --config.model.folder=DIR \\
        --config.data.pretraining=selected

A prompt whose best picture is below the threshold has none in the selection. The folder has the selected pictures as they
were, images.jsonl, which `rahf.diffusion.train`, `rahf.diffusion.evaluate` and `rahf.predict` read, and rewards.jsonl with
the reward of every picture (`number`: its place in the table, from 0). Give the same command again to continue a killed one.

Source: section 5 of paper A, with 8 pictures of a prompt, plausibility and 0.8.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from tabulate import tabulate

from rahf.diffusion import inputs, sample
from rahf.reward import specs
from rahf.reward.image_table import ImageTable
from richhf_data import command, images, jsonl, paths, ranges
from richhf_data.errors import UserError


@dataclasses.dataclass(frozen=True)
class Selection:
    """What `select` found.

    Attributes:
      rewards: float32[n], of every picture of the table.
      rows: of the selected pictures, in the order of the prompts.
    """

    rewards: np.ndarray
    rows: list[int]


def best(prompts: Sequence[str], rewards: np.ndarray, threshold: float) -> list[int]:
    """The row of each prompt's highest reward, the first of equal ones. None for a prompt below the threshold.

    Args:
      prompts: one of each picture. rewards: float[n].
    """
    found = {}
    for row, prompt in enumerate(prompts):
        if prompt not in found or rewards[row] > rewards[found[prompt]]:
            found[prompt] = row
    return [row for row in found.values() if rewards[row] >= threshold]


def select(table: ImageTable, reward: Callable, output, threshold: float) -> Selection:
    """Computes the rewards of a table and writes the selected pictures into a folder.

    Args:
      reward: (images, prompts) -> float[B]. Its results are kept in the folder, if it has an identity (reward/specs.py).

    Raises:
      UserError: no picture reaches the threshold; a reward that is not one finite number for each picture; a picture that
        cannot be read; a folder with another selection. Nothing is selected in these cases.
    """
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    digest = inputs.fingerprint_of_table(table, "images: digest")
    settings = {"images": digest, "reward": specs.identity_of(reward), "threshold": threshold}
    sample.open_output(output, settings, "images.jsonl")
    rewards = inputs.rewards_of(table, digest, reward, output)
    rows = best(table.prompts, rewards, threshold)
    if not rows:
        raise UserError(f"threshold: got {threshold:g}, but the highest reward is {rewards.max():.4g}; choose a lower one")
    chosen, lines = set(rows), {}
    for row, (_, encoded) in enumerate(table.images()):
        if row in chosen:
            name = f"{row:05d}.{images.extension(encoded)}"
            paths.replace(output / name, encoded)
            lines[row] = {"image": name, "prompt": table.prompts[row], "reward": float(rewards[row]), "number": row}
    every = [
        {"number": row, "prompt": prompt, "reward": float(value), "selected": row in chosen}
        for row, (prompt, value) in enumerate(zip(table.prompts, rewards, strict=True))
    ]
    jsonl.write(output / "rewards.jsonl", every)
    jsonl.write(output / "images.jsonl", [lines[row] for row in rows])
    return Selection(rewards, rows)


def main():
    """The command."""
    args = flags.FLAGS
    with paths.locked(args.output):
        table = ImageTable(args.images)
        found = select(table, specs.reward_of(args.reward), args.output, args.threshold)
    counts = {"all": np.arange(len(table)), "selected": found.rows}
    lines = [
        (name, len(rows), len({table.prompts[row] for row in rows}), f"{found.rewards[rows].mean():.4f}")
        for name, rows in counts.items()
    ]
    print(tabulate(lines, ("", "pictures", "prompts", "mean reward"), disable_numparse=True))
    print(f"{args.output}: images.jsonl, rewards.jsonl, {len(found.rows)} pictures")


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "A folder of rahf.diffusion.sample, a .jsonl or a .parquet of pictures and prompts.")
    flags.DEFINE_string("reward", None, "reward:DIR, rahf:DIR:plausibility or python:package.module:name.")
    flags.DEFINE_string("output", None, "The folder to write to.")
    ranges.flag("threshold", 0.8, "The least reward of a selected picture.", ranges.Range(-1e30, 1e30))
    flags.mark_flags_as_required(["images", "reward", "output"])
    command.run(main)

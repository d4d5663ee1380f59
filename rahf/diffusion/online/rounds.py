"""Rounds of pictures for the policy gradients: deals prompts, draws, asks the reward, computes advantages, deals batches.

A round's pictures are drawn with the parameters of its first step. Their ways stay on the devices until the round's last
update, and are saved with every checkpoint, so that a run that was killed in the middle of a round goes on with them.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from rahf import hosts, loop, partitioning
from rahf import program as programs
from rahf.diffusion import folder, inputs, sample
from rahf.diffusion.online import advantages, deals, policy, words
from rahf.reward import specs
from richhf_data import clip_tokenizer, schema
from richhf_data.errors import UserError


def group_of(config) -> int:
    """Pictures of one prompt in a round."""
    return config.policy.group or {"ddpo": 1, "grpo": 8}[config.method]


def check(config) -> None:
    """Refuses sizes of a round that do not divide: UserError."""
    pictures, group, size = config.policy.pictures, group_of(config), config.train.batch_size
    if pictures % group:
        raise UserError(f"policy.pictures: got {pictures}, expected a multiple of {group} (policy.group)")
    if pictures % size:
        raise UserError(f"policy.pictures: got {pictures}, expected a multiple of {size} (train.batch_size)")
    if config.method == "grpo" and group < 2:
        raise UserError(f"policy.group: got {group} for grpo, expected 2 or more pictures of a prompt")


@dataclasses.dataclass(frozen=True, eq=False)
class Rounds:
    """What a run's rounds are made of.

    Attributes:
      config, model, training: of the run.
      prompts: the texts that are dealt. contexts: float32[n, L, D], their embeddings first.
      tokenizer: CLIP's. vae: parameters, on the devices.
      reward: (images, prompts) -> float32[B]. critic: with `predict`, or None.
    """

    config: object
    model: folder.Config
    training: programs.Training
    prompts: list[str]
    contexts: np.ndarray
    tokenizer: clip_tokenizer.Tokenizer
    vae: dict
    reward: Callable
    critic: object | None

    @property
    def updates(self) -> int:
        """Batches of a round."""
        return self.config.policy.pictures // self.config.train.batch_size

    def rollouts(self) -> loop.Rollouts:
        """For `loop.start`."""
        mesh, rows = self.training.mesh, self.training.batch
        whole = partitioning.replicated(mesh)
        history = advantages.History.empty(len(self.prompts), self.config.policy.history)
        shapes = {
            "batches": {f"{update:04d}": rows for update in range(self.updates)},
            "history": {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=whole)
                for name, value in dataclasses.asdict(history).items()
            },
        }
        return loop.Rollouts(self._batches, shapes)

    def _batches(self, run: loop.Run) -> Iterator[tuple[dict, dict]]:
        draw = policy.draw(
            self.model, self.config, policy.steps_of(self.model.schedule, self.config.rollout.steps), self.training.mesh
        )
        while True:
            number, update = divmod(run.step, self.updates * self.config.policy.epochs)
            if update == 0:
                run.kept = self._drawn(run, draw, number)
            batch = run.kept["batches"][f"{update % self.updates:04d}"]
            yield {}, batch

    def _drawn(self, run: loop.Run, draw, number: int) -> dict:
        """`run.kept` of a new round."""
        config, size = self.config, self.config.train.batch_size
        group, pictures, seed = group_of(config), config.policy.pictures, config.seed
        dealt = deals.dealt(seed, len(self.prompts), number * pictures // group, pictures // group)
        groups = np.arange(len(dealt)).repeat(group)
        groups = np.random.default_rng((seed, deals.PICTURES, number)).permutation(groups)
        texts = dealt[groups]
        ways, rewards, feedback = [], [], []
        for first in range(0, pictures, size):
            run.stop_between()
            part = texts[first : first + size]
            numbers = (number * pictures + np.arange(first, first + size)) % 2**31
            prompts = [self.prompts[text] for text in part]
            way, images = self._draw(run, draw, part, numbers.astype(np.int32), prompts)
            ways.append(way)
            rewards.append(specs.checked(self.reward, images, prompts))
            if self.critic is not None:
                feedback.append(self.critic.predict(images, prompts))
        rewards = hosts.agreed(np.concatenate(rewards))
        advantages.check(rewards, first=number == 0)
        history = advantages.History(**{name: np.asarray(value) for name, value in run.kept["history"].items()})
        values, history, noted = self._advantages(texts, groups, rewards, history)
        run.log("rollout", noted | {"reward": rewards.mean(), "reward_deviation": rewards.std()})
        run.print(f"step {run.step}: reward of {pictures} pictures {rewards.mean():.4g} ± {rewards.std():.2g}")
        values, weights = self._from_critic(values, texts, feedback)
        steps = self._trained_steps(number)
        batches = {}
        for update, way in enumerate(ways):
            rows = slice(update * size, (update + 1) * size)
            own = {"advantage": values[rows], "context": self.contexts[texts[rows]], "steps": steps[rows]}
            own |= {} if weights is None else {"words": weights[rows]}
            local = {name: array[self.training.own_rows] for name, array in own.items()}
            batches[f"{update:04d}"] = way | self.training.place(local)
        whole = partitioning.replicated(self.training.mesh)
        placed = {name: partitioning.place(value, whole) for name, value in dataclasses.asdict(history).items()}
        return {"batches": batches, "history": placed}

    def _draw(self, run, draw, texts, numbers, prompts) -> tuple[dict, np.ndarray]:
        rows = self.training.own_rows
        placed = self.training.place({"context": np.asarray(self.contexts[texts[rows]]), "number": numbers[rows]})
        empty = self.training.constants["empty"]
        seed = sample.seed_data(self.config.seed)
        way, images, finite = draw(run.state["params"], self.vae, placed["context"], empty, placed["number"], seed)
        images, finite = jax.device_get((images, finite))
        if not finite.all():
            place = int(np.argmin(finite))
            raise UserError(
                f"rollout: picture {numbers[place]}, of the prompt {prompts[place][:80]!r}, is not finite at step "
                f"{run.step}; lower --config.optimizer.learning_rate or rollout.guidance_scale, or compute in float32"
            )
        return way, images

    def _advantages(self, texts, groups, rewards, history):
        limit, noted = self.config.policy.max_advantage, {}
        if self.config.method == "ddpo":
            history = history.with_rewards(texts, rewards)
            values = advantages.of_prompts(texts, rewards, history)
        else:
            values, equal = advantages.of_groups(groups, rewards)
            noted["equal_groups"] = equal
        return np.clip(values, -limit, limit), history, noted

    def _from_critic(self, values, texts, feedback) -> tuple[np.ndarray, np.ndarray | None]:
        """Advantages of regions, and weights of tokens, where they are wanted."""
        dense, found, weights = self.config.dense, values, None
        if dense.weight > 0:
            names = [schema.HEATMAPS.index(name) for name in dense.heatmaps]
            grid = self.model.unet.sample_size
            maps = [inputs.on_grid(one.heatmaps, self.config.train.batch_size, grid) for one in feedback]
            maps = np.concatenate(maps)[..., names].sum(-1)
            limit = self.config.policy.max_advantage
            found = np.clip(advantages.regional(values, hosts.agreed(maps), dense.weight), -limit, limit)
        if dense.words > 0:
            prompts = [self.prompts[text] for text in texts]
            labelled = [text for one in feedback for text in one.labelled_prompts]
            weights = words.token_weights(
                self.tokenizer, prompts, labelled, dense.words, 1, self.contexts.shape[1], self.critic.vocabulary.written
            )
            weights = hosts.agreed(np.where(values[:, None] < 0, 2 - weights, weights))
        return found, weights

    def _trained_steps(self, number: int) -> np.ndarray:
        """Which steps of each picture are trained, int32[pictures, K]."""
        steps = policy.steps_of(self.model.schedule, self.config.rollout.steps)
        possible = np.flatnonzero(steps.noise)
        rng = np.random.default_rng((self.config.seed, deals.STEPS, number))
        chosen = rng.permuted(np.tile(possible, (self.config.policy.pictures, 1)), axis=1)
        return chosen[:, : policy.trained_of(self.config, steps)].astype(np.int32)

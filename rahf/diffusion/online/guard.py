"""Watches an online fine-tuning run for reward hacking: the reward rises while the pictures get worse.

At each evaluation the run draws pictures of held-out prompts from the same noise. A second reward, never trained on, shows
whether they get better: it picks the best step, ends the run, and warns where the two rewards part.

    guard = Guard(reward, held_out=other, patience=5, workdir=workdir, print=run.print)
    guard.resume(run.step)
    for step in run.steps():
        if run.due(config.eval.every):
            run.log("held_out", guard.measured(step, images, prompts, more={"kl": kl}))
            if guard.best[0] == step:
                ...  # keep these parameters
            if guard.stop:
                break

    workdir/evaluations.jsonl    a line for each evaluation: what `measured` returned, and what pairs two of them
    workdir/evaluations.png      the same as curves

All decisions are functions of this history alone, so a resumed run decides as one that was never killed.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import matplotlib
import matplotlib.ticker
import numpy as np
from etils import epath

from rahf import hosts
from rahf.diffusion import evaluate
from rahf.diffusion.generator_metrics import Mean, diversity, frechet_distance, mean_of
from rahf.fingerprint import fingerprint
from rahf.reward import specs
from richhf_data import checked, json_files, jsonl, paths, plotting, ranges
from richhf_data.errors import UserError

HISTORY, FIGURE = "evaluations.jsonl", "evaluations.png"
TITLES = {"reward": "trained reward", "held_out": "held-out reward", "diversity": "diversity", "fid": "FID"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a line of the history holds beside the numbers that `Guard.measured` returned.

    Attributes:
      prompts: a digest of the prompts. shares: of "reward" and "held_out", those of `generator_metrics.Mean` in the order of
        the prompts.
    """

    step: int
    prompts: str
    shares: dict[str, tuple[float, ...]]


class Guard:
    """What a run has measured so far, and what follows from it.

    Args:
      reward: (images, prompts) -> float[B], which is trained; None if none is.
      held_out: another reward, never trained on. Without it, the trained one decides and nothing can warn.
      features: (images) -> float[B, D], for diversity and FID.
      reference: float[m, D], the features of real pictures, for FID. FID of few pictures is biased: compare it within a run.
      patience: evaluations without an improvement before `stop`; 0 = never.
      workdir: holds the history. All processes read it, process 0 writes.
      print: shows a text; called on process 0.

    Attributes:
      history: the lines of the file, in the order of their steps.

    Raises:
      UserError: no reward; a held-out reward that is the trained one; a reference without features; a patience below 0; a
        history that is damaged, or of a run with other rewards.
    """

    def __init__(
        self,
        reward: Callable | None,
        *,
        held_out: Callable | None = None,
        features: Callable | None = None,
        reference: np.ndarray | None = None,
        patience: int = 0,
        workdir,
        print: Callable[[str], None] = print,
    ):
        evaluate.check_reference(reference, features)
        if patience not in ranges.NUMBER:
            raise UserError(f"patience: got {patience!r}, expected {ranges.NUMBER}; 0 never stops")
        self._rewards = {name: one for name, one in (("reward", reward), ("held_out", held_out)) if one is not None}
        if not self._rewards:
            raise UserError("reward: got none and none held out, expected one to watch")
        identities = [specs.identity_of(one, name) for name, one in self._rewards.items()]
        if reward is held_out or (len(identities) == 2 and None is not identities[0] == identities[1]):
            raise UserError("held_out: got the reward that is trained, expected another: it is to show where that is hacked")
        self._features, self._reference, self._patience, self._print = features, reference, patience, print
        self._folder = paths.absolute(workdir)
        self.history = read_history(self._folder / HISTORY)
        for entry in self.history:
            if not entry["shares"].keys() == self._rewards.keys() <= entry.keys():
                raise UserError(
                    f"{self._folder / HISTORY}: step {entry['step']} has {sorted(entry['shares'])}, this run measures "
                    f"{sorted(self._rewards)}; take another --workdir"
                )

    def resume(self, step: int) -> None:
        """Drops the evaluations after the step that the run goes on from: it repeats them."""
        self.history = [entry for entry in self.history if entry["step"] <= step]

    def measured(
        self, step: int, images: np.ndarray, prompts: Sequence[str], *, more: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Measures the pictures of a step and writes the history with it. Call it in all processes.

        It takes the place of an evaluation of the same step, and later ones are dropped.

        Args:
          images: uint8[n, S, S, 3], of the same noise each time. prompts: n, the same each time, with repeats for diversity.
          more: other numbers of the step, such as the KL, to be kept with these.

        Returns:
          "reward", "reward/se" (its standard error over prompts), "held_out", "held_out/se", "diversity", "fid" and those of
          `more`, as process 0 has them. What is not measured or no finite number is left out.

        Raises:
          UserError: other prompts than before; as `evaluate.evaluate`.
        """
        digest, earlier = fingerprint(list(prompts)), [entry for entry in self.history if entry["step"] < step]
        if any(entry["prompts"] != digest for entry in earlier):
            raise UserError(
                f"prompts: got others than at step {earlier[-1]['step']} in {self._folder / HISTORY}, expected the same, in "
                "the same order; take another --workdir"
            )
        results, shares = dict(more or {}), {}
        assert not results.keys() & {"step", "prompts", "shares", *TITLES}, results
        for name, reward in self._rewards.items():
            with json_files.named(TITLES[name]):
                values, _ = evaluate.measure(images, prompts, reward=reward, desc=TITLES[name])
            mean = mean_of(values["reward"], prompts)
            results |= {name: mean.value, f"{name}/se": mean.error}
            shares[name] = np.float64(list(mean.shares.values()))
        if self._features is not None:
            found = evaluate.compute_features(self._features, images, len(images))
            results["diversity"] = diversity(found, prompts)
            if self._reference is not None:
                results["fid"] = frechet_distance(found, self._reference)
        results, shares = hosts.agreed((results, shares))
        results = {name: float(value) for name, value in results.items() if math.isfinite(value)}
        shares = {name: of_prompts.tolist() for name, of_prompts in shares.items()}
        self.history = [*earlier, {"step": step, **results, "prompts": digest, "shares": shares}]
        if jax.process_index() == 0:
            jsonl.write(self._folder / HISTORY, self.history)
            paths.replace(self._folder / FIGURE, figure(self.history))
            if (text := warning(self.history)) and not warning(earlier):
                self._print(text)
        return results

    @property
    def best(self) -> tuple[int, float] | None:
        """The first step with the highest held-out reward, or trained reward without one, and that reward."""
        if not self.history:
            return None
        entry = best(self.history)
        return entry["step"], entry[_decides(entry)]

    @property
    def stop(self) -> bool:
        """Whether the last `patience` evaluations, or more, improved nothing."""
        top = self.best
        return top is not None and 0 < self._patience <= sum(entry["step"] > top[0] for entry in self.history)


def read_history(file: epath.Path) -> list[dict]:
    """The evaluations of a file; none where there is no file. Raises UserError if it is damaged."""
    history, fixed = [], [field.name for field in dataclasses.fields(Entry)]
    for number, line in jsonl.lines(io.BytesIO(file.read_bytes() if file.exists() else b"")):
        entry = jsonl.parse(line, "an evaluation", where := f"{file} line {number}")
        with json_files.named(where):
            checked.conform(Entry, entry, extra=True)
            checked.conform(dict[str, float], {name: value for name, value in entry.items() if name not in fixed})
        history.append(entry)
    return history


def best(history: Sequence[Mapping]) -> Mapping:
    """The first evaluation with the highest held-out reward, or trained reward without one."""
    return max(history, key=lambda entry: entry[_decides(entry)])


def warning(history: Sequence[Mapping]) -> str | None:
    """What to tell of the last evaluation if it shows reward hacking.

    It does where, since the best step, the trained reward rose and the held-out one fell, each by more than the standard
    error of its difference, which is paired by prompt.
    """
    if not history or not {"reward", "held_out"} <= history[-1].keys():
        return None
    top, last = best(history), history[-1]
    rise, fall = _mean(last, "reward") - _mean(top, "reward"), _mean(top, "held_out") - _mean(last, "held_out")
    if not (rise.value > rise.error and fall.value > fall.error):
        return None
    return (
        f"WARNING: reward hacking at step {last['step']}? Since step {top['step']}, the best one, the trained reward rose "
        f"from {top['reward']:.4g} to {last['reward']:.4g} (by {rise.value:.2g}, standard error {rise.error:.2g}) and the "
        f"held-out one fell from {top['held_out']:.4g} to {last['held_out']:.4g} (by {fall.value:.2g}, standard error "
        f"{fall.error:.2g}). Stop and take the model of step {top['step']}, or begin again in another --workdir with a "
        "larger beta, the weight of the KL, or with another reward, such as an ensemble."
    )


def figure(history: Sequence[Mapping]) -> bytes:
    """The evaluations as curves over the steps, a PNG. Bands are one standard error; a dotted line marks the best step."""
    steps, top = [entry["step"] for entry in history], best(history)
    names = [name for name in TITLES if any(name in entry for entry in history)]
    colors = dict(zip(TITLES, plotting.SCORE_COLORS, strict=True))
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8}):
        made, panels = plotting.panels((4.8, 0.4 + 1.3 * len(names)), 200, len(names))
        for name, axes in zip(names, panels, strict=True):
            values, errors = (np.array([entry.get(key, np.nan) for entry in history]) for key in (name, f"{name}/se"))
            axes.axvline(top["step"], color=plotting.NEUTRAL, linewidth=1, linestyle=":")
            axes.fill_between(steps, values - errors, values + errors, color=colors[name], alpha=0.25, linewidth=0)
            axes.plot(steps, values, "o-", color=colors[name], linewidth=1.4, markersize=2.5)
            if name == _decides(top):
                axes.plot(top["step"], top[name], "o", color=colors[name], markersize=7, markerfacecolor="none")
            axes.set_title(TITLES[name], loc="left", fontsize=8, color=plotting.INK)
        panels[0].set_title(f"best: step {top['step']}", loc="right", fontsize=8, color=plotting.INK)
        ticks = matplotlib.ticker.MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        panels[-1].xaxis.set_major_locator(ticks)
        panels[-1].set(xlabel="step")
        if len(history) == 1:
            panels[-1].set(xlim=(steps[0] - 1, steps[0] + 1))
        return plotting.png(made)


def _decides(entry: Mapping) -> str:
    return "held_out" if "held_out" in entry else "reward"


def _mean(entry: Mapping, name: str) -> Mean:
    return Mean(entry[name], len(entry["shares"][name]), dict(enumerate(entry["shares"][name])))

"""Pairs of pictures of which one is preferred, and Diffusion-DPO's loss on them (arXiv 2311.12908).

    loss = mean(-log sigmoid(-beta (d_w - d_l)))

    d_w, d_l: the trained model's denoising error minus the reference's, of the preferred and of the other picture

The error is the mean over the latents' pixels and channels (the paper has the sum), for one noise and one timestep that both
networks and both pictures share. beta is the paper's beta T omega, the same for each timestep. The authors' code multiplies
with half of its `beta_dpo`: 5,000 there is 2,500 here.

Pairs come from

    pick_a_pic     Pick-a-Pic's parquet: caption, jpg_0, jpg_1, label_0, label_1
    of_table       {"prompt": text, "preferred": path, "other": path} a line of a .jsonl, or these columns of a .parquet
    of_responses   people's responses to two sets of pictures (side_by_side.py), such as the annotation server exports
    of_rewards     a model's own pictures and their rewards: the best of a prompt against its worst
"""

import collections
import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet

from rahf import program as programs
from rahf.diffusion import finetuning, folder, inputs, side_by_side
from rahf.diffusion.blocks import repeated
from rahf.diffusion.online.words import token_weights, weighted
from rahf.fingerprint import fingerprint
from rahf.reward import specs
from rahf.reward.image_table import ImageTable, refuse
from richhf_data import images, input_files
from richhf_data.errors import UserError

Array = jax.Array
NAME = "preferences"  # in errors


# ---- Pairs ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The preferred pictures of all pairs, or the others; for `rahf.diffusion.inputs` an `ImageTable`.

    Attributes:
      path: where the pairs are from. prompts: list of texts. places: a name for each pair in errors.
      images: a function that yields (file and row for errors, encoded image) for each pair, in order.
    """

    path: pathlib.Path | str
    prompts: list[str]
    places: list[str]
    images: Callable[[], Iterator[tuple[str, bytes]]]

    def __len__(self):
        return len(self.prompts)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of different pictures of one prompt, checked. `str` says in one line how many they are.

    Attributes:
      preferred, other: row i of both is pair i.
      left_out: why -> how many rows, pairs or prompts of the source are no pair, such as {"ties": 3}.
      identities: "preferred", "other" -> `inputs.fingerprint_of_table`, so that no picture is read again for it.
    """

    preferred: Side
    other: Side
    left_out: Mapping[str, int]
    identities: Mapping[str, str]

    def __len__(self):
        return len(self.preferred)

    def __str__(self):
        return f"pairs: {len(self):,} of {self.preferred.path}; left out: {_listed(self.left_out)}"


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count) or "none"


def _checked(path, prompts, places, preferred: Callable, other: Callable, left_out: Mapping[str, int]) -> Pairs:
    """The pairs, if there are any, and each is of two pictures. Reads every picture.

    Args:
      preferred, other: `Side.images`.
    """
    if not prompts:
        raise UserError(f"{NAME}: {path} has no pair left, expected one or more; left out: {_listed(left_out)}")
    sides = [Side(path, prompts, places, read) for read in (preferred, other)]
    digests, faults = ([], []), []
    read = zip(*(side.images() for side in sides), strict=True)
    for part in inputs.parts_of(read, inputs.REWARDED_AT_ONCE, "pairs: digest", len(prompts)):
        for both in part:
            for found, (_, encoded) in zip(digests, both, strict=True):
                found.append(hashlib.sha256(encoded).hexdigest())
            if digests[0][-1] == digests[1][-1]:
                place = places[len(digests[0]) - 1]
                faults.append(f"{place}: got one picture twice, expected two different pictures")
    refuse(f"{NAME}: {path}", faults)
    identities = [fingerprint(prompts, found) for found in digests]
    return Pairs(*sides, left_out, dict(zip(("preferred", "other"), identities, strict=True)))


# ---- Tables of pairs ------------------------------------------------------------------------------------------------
class PairTable(ImageTable):
    """A table of pairs, by the rules of `ImageTable`.

    Attributes:
      choices: for each row, which one of its pictures is preferred, 0 or 1; None leaves it out.
      left_out: why -> how many rows.
    """

    name, columns, pictures = NAME, ("prompt", "preferred", "other"), ("preferred", "other")
    expected = '{"prompt": text, "preferred": path, "other": path}'
    listing = "preferences.jsonl"

    def __init__(self, path):
        super().__init__(path)
        verdicts = [self._verdict(row) for row in self._checked]
        self.choices = [None if isinstance(verdict, str) else verdict for verdict in verdicts]
        self.left_out = collections.Counter(verdict for verdict in verdicts if isinstance(verdict, str))
        del self._checked  # a million rows in Pick-a-Pic

    def images(self, which: int) -> Iterator[tuple[str, bytes]]:
        """Yields (file and row for errors, encoded image) of the preferred pictures (0) or of the others (1)."""
        columns = sorted({self.pictures[choice ^ which] for choice in self.choices if choice is not None})
        rows = zip(self._rows(columns), self.choices, strict=True) if columns else ()
        for (where, row), choice in rows:
            if choice is not None:
                column = self.pictures[choice ^ which]
                yield f"{self.name}: {self.path}: {where}: {column}", self._encoded(where, row, column)

    def _verdict(self, row) -> int | str:
        """`choices` of a row, or why it is left out."""
        return 0


class PickAPicTable(PairTable):
    """A parquet file of Pick-a-Pic (arXiv 2305.01569), v1 or v2.

    Left out are ties, and what the file itself says is no preference: has_label or are_different is False.
    """

    columns = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
    prompt, pictures = "caption", ("jpg_0", "jpg_1")
    uids = ("image_0_uid", "image_1_uid")
    optional = ("has_label", "are_different", *uids)
    endings = (".parquet",)

    def _parquet_rows(self, columns, only=None):
        for where, row in super()._parquet_rows(columns, only):
            found = [] if isinstance(row, str) else [str(row[uid]) for uid in self.uids if row.get(uid)]
            yield f"{where} ({', '.join(found)})" if found else where, row

    def _faults(self, row):
        labels = row["label_0"], row["label_1"]
        good = row.get("has_label") is False or labels in ((1, 0), (0, 1), (0.5, 0.5))
        expected = "expected 1 and 0, 0 and 1, or 0.5 twice"
        return super()._faults(row) + ([] if good else [f"label_0, label_1: got {labels[0]} and {labels[1]}, {expected}"])

    def _verdict(self, row):
        if row.get("has_label") is False:
            return "rows without a label"
        if row.get("are_different") is False:
            return "rows of one picture"
        return "ties" if row["label_0"] == 0.5 else int(row["label_1"])


def _of_tables(path, tables: Sequence[PairTable]) -> Pairs:
    prompts, places = [], []
    for table in tables:
        for prompt, place, choice in zip(table.prompts, table.places, table.choices, strict=True):
            if choice is not None:
                prompts.append(prompt)
                places.append(place if len(tables) == 1 else f"{table.path}: {place}")
    left_out = sum((table.left_out for table in tables), collections.Counter())

    def side(which):
        return lambda: itertools.chain.from_iterable(table.images(which) for table in tables)

    return _checked(path, prompts, places, side(0), side(1), left_out)


def of_table(path) -> Pairs:
    """The pairs of a .jsonl or .parquet file, or of a folder with a preferences.jsonl (`PairTable`).

    Raises:
      UserError: as `ImageTable`, of "preferred" and "other"; a pair of one picture.
    """
    table = PairTable(path)
    return _of_tables(table.path, [table])


def pick_a_pic(pattern) -> Pairs:
    """The pairs of Pick-a-Pic's parquet files (`PickAPicTable`).

    Args:
      pattern: a path or a glob.

    Raises:
      UserError: no such file, a missing column, a row without a picture or with other labels, a pair of one picture, no pair
        left; names file and row.
    """
    files = input_files.matches(pattern)
    if not files:
        raise UserError(f"{NAME}: no file matches {str(pattern)!r}, expected parquet files; quote the pattern in a shell")
    return _of_tables(pattern, [PickAPicTable(file) for file in files])


# ---- Pairs of other tables' pictures --------------------------------------------------------------------------------
def sets_of(given: Sequence[str]) -> dict[str, ImageTable]:
    """NAME=DIR of each set of pictures -> {NAME: `ImageTable` of DIR}. Raises UserError for another form."""
    found = {}
    for one in given:
        name, _, place = one.partition("=")
        if not name or not place or name in found:
            raise UserError(f"{NAME}: sets: got {one!r}, expected NAME=DIR with the responses' names, each once")
        found[name] = ImageTable(place)
    return found


def _picked(tables: Mapping[str, ImageTable], sources: Sequence[tuple[str, int]]) -> Callable:
    """`Side.images` for the rows `sources`, each (name of a table, row)."""
    rows = collections.defaultdict(list)
    for name, row in sources:
        rows[name].append(row)

    def read():
        streams = {name: tables[name].images(of_table) for name, of_table in rows.items()}
        for name, _ in sources:
            yield next(streams[name])

    return read


def _rows_of_prompts(table: ImageTable) -> dict[str, list[int]]:
    rows = collections.defaultdict(list)
    for row, prompt in enumerate(table.prompts):
        rows[prompt].append(row)
    return dict(rows)


def of_responses(path, tables: Mapping[str, ImageTable]) -> Pairs:
    """The pairs that people responded to. Of a pair's responses the mean decides; one of 0 is a tie, and left out.

    A line of `side_by_side.responses_of` that has digests, as the annotation server writes them, is about the pictures of
    these digests. A line without is about the only pair of its prompt, as `side_by_side.paired` pairs them.

    Args:
      tables: name -> pictures, of all sets that the responses name.

    Raises:
      UserError: as `responses_of`; a prompt or a picture that a set does not have, a prompt of several pairs without
        digests, a pair of one picture, no pair left; names file and line.
    """
    hint = f"{', '.join(map(str, tables))} are the names that were given as NAME=DIR"
    lines = list(side_by_side.responses_of(path, list(tables), hint))
    rows, digests = {name: _rows_of_prompts(table) for name, table in tables.items()}, {}
    if any(line.digests for line in lines):
        for name, table in tables.items():
            parts = inputs.parts_of(table.images(), inputs.REWARDED_AT_ONCE, f"{name}: digest", len(table))
            digests[name] = [images.digest(encoded) for part in parts for _, encoded in part]

    def pictures(line, name, digest):
        found = rows[name].get(line.prompt, [])
        if not found:
            raise UserError(f"{line.where}: prompt: got {line.prompt[:80]!r}, expected one of {name} ({tables[name].path})")
        if digest is not None:
            found = [row for row in found if digests[name][row] == digest]
            if not found:
                of_set = f"{name} ({tables[name].path})"
                raise UserError(f"{line.where}: got the digest {digest[:80]!r}, expected that of a picture in {of_set}")
        return found

    sums, first = collections.Counter(), {}
    for line in lines:
        left, right = map(pictures, (line, line), (line.left, line.right), line.digests or (None, None))
        if line.digests is None and (count := min(len(left), len(right))) > 1:
            raise UserError(
                f"{line.where}: got a prompt of {count} pairs of pictures, expected one, or digests that tell the pair; "
                "export the responses again from the annotation project"
            )
        pair, value = ((line.left, left[0]), (line.right, right[0])), line.value
        if pair[::-1] in first:
            pair, value = pair[::-1], -value
        first.setdefault(pair, line)
        sums[pair] += value
    decided = [pair for pair in first if sums[pair]]
    sources = [[pair[(sums[pair] > 0) ^ which] for pair in decided] for which in (0, 1)]
    prompts = [first[pair].prompt for pair in decided]
    places = [first[pair].where.removeprefix(f"responses: {path} ") for pair in decided]
    sides = (_picked(tables, of_side) for of_side in sources)
    return _checked(path, prompts, places, *sides, {"ties": len(first) - len(decided)})


def of_rewards(table: ImageTable, rewards: np.ndarray, margin: float) -> Pairs:
    """Of each prompt the picture with the highest reward against that with the lowest, if they differ by `margin` or more.

    Args:
      rewards: float[n], of the table's pictures. margin: 0 or more; equal rewards are no pair.

    Raises:
      UserError: another number of rewards, ones that are not finite, a faulty margin, a pair of one picture, no pair left.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape != (len(table),) or not np.isfinite(rewards).all():
        got = f"shape {rewards.shape}" if rewards.shape != (len(table),) else "numbers that are not finite"
        raise UserError(f"rewards: got {got}, expected a finite number for each of {len(table)} pictures of {table.path}")
    if not 0 <= margin < math.inf:
        raise UserError(f"margin: got {margin}, expected a number of 0 or more")
    rows = list(_rows_of_prompts(table).values())
    best, worst = (np.array([choose(of, key=lambda row: rewards[row]) for of in rows]) for choose in (max, min))
    differ = side_by_side.from_scores(rewards[worst], rewards[best], (margin, 2 * margin + 1)) > 0
    best, worst = best[differ].tolist(), worst[differ].tolist()
    prompts = [table.prompts[row] for row in best]
    places = [f"{table.places[one]} and {table.places[two]}" for one, two in zip(best, worst, strict=True)]
    sides = (_picked({"": table}, [("", row) for row in of_side]) for of_side in (best, worst))
    why = f"prompts whose rewards differ by less than {margin:g}" if margin else "prompts of one reward"
    return _checked(table.path, prompts, places, *sides, {why: int(np.sum(~differ))})


# ---- Loss -----------------------------------------------------------------------------------------------------------
def batch_shapes(model: folder.Config, size: int, words: bool = False) -> dict[str, tuple[int, ...]]:
    """name -> shape of each array of a batch of pairs, with weights of tokens or without; all are float32."""
    shapes = inputs.batch_shapes(model, size)
    of_words = {name: (size, model.text.text.length) for name in ("preferred_words", "other_words")}
    return {
        "preferred": shapes["moments"],
        "other": shapes["moments"],
        "context": shapes["context"],
        **(of_words if words else {}),
    }


def normalisers_of(batch) -> dict[str, Array]:
    """What the sums of the loss are divided by, of the global batch."""
    return {"rows": jnp.float32(len(batch["context"]))}


def make_loss(model: folder.Config, beta: float, lora_alpha: float) -> Callable:
    """(params, rows, normalisers, key) -> (loss, metrics), which add up over the parts of a batch.

    params: as `finetuning.merged` takes them, and "reference", the UNet that never changes; with LoRA that is "unet".
    rows: preferred, other: moments float32[B, h, w, 2Z] (mean and log variance of the VAE); context float32[B, L, D]; and
    preferred_words, other_words float32[B, L] where tokens have weights (`words.weighted`).

    Metrics, means over the rows: loss; accuracy, the share of pairs whose preferred picture has the higher implicit reward,
    a tie counts half; margin, the difference of their implicit rewards, -beta (d_w - d_l); preferred_error and other_error,
    the trained model's denoising errors.
    """
    unet, schedule = model.modules["unet"], model.schedule

    def loss_fn(params, rows, normalisers, key):
        latent_key, time_key, noise_key = jax.random.split(key, 3)
        moments = _in_turn(rows["preferred"], rows["other"])
        x0 = finetuning.drawn_latents(model, moments, latent_key)
        pairs = len(rows["context"])
        noise = repeated(jax.random.normal(noise_key, (pairs, *x0.shape[1:])), len(x0))
        timesteps = repeated(jax.random.randint(time_key, (pairs,), 0, schedule.num_train_timesteps), len(x0))
        noised, target = schedule.add_noise(x0, noise, timesteps), schedule.target(x0, noise, timesteps)
        context = repeated(rows["context"], len(x0))

        def errors(params, words=None):
            """float32[B, 2], of the preferred and of the other picture."""
            text = context
            if words is not None:
                text = weighted(unet.apply({"params": params}, context, method="keys_values"), words)
            prediction = unet.apply({"params": params}, noised, timesteps, text)
            return jnp.square(prediction - target).mean((1, 2, 3)).reshape(pairs, 2)

        words = _in_turn(rows["preferred_words"], rows["other_words"]) if "preferred_words" in rows else None
        reference = params["unet"] if "lora" in params else params["reference"]
        own = errors(finetuning.merged(params, lora_alpha), words)
        change = own - errors(jax.lax.stop_gradient(reference))
        margins = -beta * (change[:, 0] - change[:, 1])
        found = {
            "loss": -jax.nn.log_sigmoid(margins),
            "accuracy": 0.5 + 0.5 * jnp.sign(margins),
            "margin": margins,
            "preferred_error": own[:, 0],
            "other_error": own[:, 1],
        }
        metrics = {name: jnp.sum(values) / normalisers["rows"] for name, values in found.items()}
        return metrics["loss"], metrics

    return loss_fn


def _in_turn(first: Array, second: Array) -> Array:
    """[B, ...] twice -> [2B, ...], row by row from both, so that rows divided over devices stay on theirs."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


# ---- The trainer's part ---------------------------------------------------------------------------------------------
def pairs_of(config, reward: Callable | None, cache: pathlib.Path) -> Pairs:
    """The pairs that a config names: `data.pairs`, or the best and the worst of `data.images`.

    Args:
      reward: (images, prompts) -> float32[B], of `data.images`. cache: where rewards are kept (`inputs.rewards_of`).

    Raises:
      UserError: none or both of them, and as the readers above.
    """
    data = config.data
    if bool(data.pairs) == bool(data.images):
        got = f"data.pairs={data.pairs!r} and data.images={data.images!r}"
        raise UserError(f"{NAME}: got {got}, expected one of them: preferences, or the model's own pictures for a reward")
    if data.images:
        table = ImageTable(data.images)
        digest = inputs.fingerprint_of_table(table, "images: digest")
        return of_rewards(table, inputs.rewards_of(table, digest, reward, cache), config.reward.margin)
    if data.sets:
        return of_responses(data.pairs, sets_of(data.sets))
    files = input_files.matches(data.pairs)
    if files and files[0].suffix == ".parquet" and "caption" in pyarrow.parquet.read_schema(files[0]).names:
        return pick_a_pic(data.pairs)
    return of_table(data.pairs)


def program(model: folder.Config, config) -> programs.Program:
    """The training of a model (of `finetuning.model_config`) on pairs, to be assembled (program.py)."""
    shapes = batch_shapes(model, 1, config.dense.words > 0)
    return programs.Program(
        init=lambda key: finetuning.initial_params(model, config.lora.rank, key),
        loss=make_loss(model, config.preference.beta, config.lora.alpha),
        normalisers=normalisers_of,
        batch_shapes=lambda rows: {name: ((rows, *shape[1:]), "float32") for name, shape in shapes.items()},
        remat=("model.remat",),
        frozen=("unet",) if config.lora.rank else (),
        constants=finetuning.reference_shapes(model, config),
    )


def batches_from(
    config, data: inputs.Inputs, contexts: np.ndarray, prompts: Sequence[str], critic, cache: pathlib.Path, training
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """step -> endless batches from that step on. A batch depends only on the seed and its step.

    Args:
      data: with the tables "preferred" and "other". contexts: float32[texts, L, D], as `data.texts`.
      prompts: those whose pairs are trained on. critic: a `rahf.predictor.Model` with keywords, for `dense.words`.
      training: program.Training.
    """
    moments = {name: data.moments(name, cache, training.mesh) for name in ("preferred", "other")}
    words = {}
    if config.dense.words:
        words = {name: words_of(config, data, name, critic, sign, cache) for name, sign in (("preferred", 1), ("other", -1))}
    known = set(prompts)
    trained = np.array([prompt in known for prompt in data.tables["preferred"].prompts], np.float32)
    rows = data.rows("preferred", moments["preferred"], trained)
    size, own = config.train.batch_size, training.own_rows

    def batches(start):
        for step in itertools.count(start):
            drawn = rows.drawn(config.seed, 0, step * size, size)[own]
            empty = np.random.default_rng((config.seed, 2, step)).random(size)[own] < config.train.text_dropout
            batch = {"context": contexts[np.where(empty, len(contexts) - 1, rows.text[drawn])]}
            batch |= {name: array[drawn] for name, array in moments.items()}
            yield batch | {f"{name}_words": np.where(empty[:, None], 1, of[drawn]) for name, of in words.items()}

    return batches


def words_of(config, data: inputs.Inputs, name: str, critic, sign: int, cache: pathlib.Path) -> np.ndarray:
    """The weights of the tokens of a table's prompts, float32[n, L]. Cached only if the critic has an identity."""
    table, model, identity = data.tables[name], data.model, specs.identity_of(critic, "critic")
    length, place = model.config.text.text.length, None

    def weights(part, prompts):
        labelled = critic.predict(part, prompts).labelled_prompts
        return token_weights(model.tokenizer, prompts, labelled, config.dense.words, sign, length, critic.vocabulary.written)

    if identity is not None:
        key = fingerprint(data.identities[name], identity, config.dense.words, sign, data.identities["model"])
        place = cache / f"words-{key}.npy"
    return inputs.of_images(table, weights, f"{name}: words", place, (len(table), length))

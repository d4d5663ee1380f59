"""How good a generator's pictures are; of several generators, before and after fine-tuning for instance, side by side.

    python -m rahf.diffusion.evaluate --images=before --images=after --output=report \\
        --reward=reward:DIR --clip=DIR --reference=real.parquet --features=clip:DIR --config=configs/reward_clip.py

prints a table, and writes results.json and report.html, one page with the pictures of the same prompts beside each other.
Pictures are tables or folders as `rahf.reward.feedback.Pictures` reads them; rewards and features are named as
`rahf.reward.sources` says. In Python `compare` does the same, with a judge as well; `evaluate` takes images in memory.

Errors of means are standard errors over prompts: images of one prompt are alike and count together, and a difference is
taken prompt by prompt.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import cv2
import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm.auto import tqdm

from rahf import experiments
from rahf.reward import embed, sources
from rahf.reward import prompts as rahf_prompts
from rahf.reward.feedback import Pictures
from richhf_data import command, drawing, images, json_files, paths
from richhf_data.errors import UserError

BATCH = 32  # images at a time


# ---- Metrics --------------------------------------------------------------------------------------------------------
def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of the Gaussians with the means and (unbiased) covariances of two sets of features: FID.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), arXiv 1706.08500. With centred features X, A = X'X / (n - 1), so that
    tr (A B)^(1/2) is the sum of the singular values of X_a X_b' / ((n - 1) (m - 1))^(1/2): no square root of a matrix,
    and nothing has to be added where a covariance is singular (n <= D). Computed in float64.

    Args:
      a, b: float[n, D], float[m, D].

    Raises:
      UserError: other shapes, fewer than 2 rows, values that are not finite.
    """
    a, b = _features("a", a), _features("b", b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features: got {a.shape[1]} and {b.shape[1]} columns, expected those of one network")
    if min(len(a), len(b)) < 2:
        raise UserError(f"features: got {len(a)} and {len(b)} rows, expected 2 or more for a covariance")
    means = a.mean(axis=0), b.mean(axis=0)
    roots = [np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r") for x, mean in zip((a, b), means, strict=True)]
    traces = sum(np.sum(root**2) for root in roots)
    distance = np.sum((means[0] - means[1]) ** 2) + traces - 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    return max(0.0, float(distance))


def diversity(features: np.ndarray, prompts: Sequence[str]) -> float:
    """How different the images of one prompt are: the cosine distance (1 - cosine, 0 to 2) of two of them, the mean over a
    prompt's pairs, then over the prompts that have two images or more; nan where none has.

    Args:
      features: float[n, D], one row an image. prompts: n of them.

    Raises:
      UserError: not as many rows as prompts, values that are not finite, a row of zeros.
    """
    found = list(diversities(features, prompts).values())
    return float(np.mean(found)) if found else math.nan


def diversities(features: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """`diversity` of each prompt that has two images or more; same arguments and errors."""
    features = _features("features", features)
    if len(features) != len(prompts):
        raise UserError(f"features: got {len(features)} rows for {len(prompts)} prompts, expected as many")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"features: row {int(lengths.argmin())} is all zeros, expected one with a direction")
    rows = {}
    for row, prompt in zip(features / lengths, prompts, strict=True):
        rows.setdefault(prompt, []).append(row)
    found = {}
    for prompt, unit in rows.items():
        if (count := len(unit)) > 1:
            cosines = (np.sum(np.sum(unit, axis=0) ** 2) - count) / (count * (count - 1))
            found[prompt] = max(0.0, float(1 - cosines))
    return found


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over images.

    Attributes:
      value: nan where there are none. count: of how many.
      shares: prompt -> by how much its images together move the mean from what the others say; their sum is 0.
    """

    value: float
    count: int
    shares: Mapping[str, float]

    @property
    def error(self) -> float:
        """Standard error, by prompts; s / sqrt(n) where each image has a prompt of its own; nan with fewer than 2."""
        count = len(self.shares)
        if count < 2:
            return math.nan
        return math.sqrt(count / (count - 1) * sum(share**2 for share in self.shares.values()))

    def __sub__(self, other: "Mean") -> "Mean":
        """The difference; its error is smaller than that of two independent means where both are of the same prompts."""
        names = dict.fromkeys([*self.shares, *other.shares])
        shares = {name: self.shares.get(name, 0.0) - other.shares.get(name, 0.0) for name in names}
        return Mean(self.value - other.value, min(self.count, other.count), shares)


def mean_of(values: np.ndarray, prompts: Sequence[str]) -> Mean:
    """Of float[n], without those that are nan, and the prompts they are of."""
    values = np.asarray(values, np.float64)
    rows = np.flatnonzero(~np.isnan(values))
    if not len(rows):
        return Mean(math.nan, 0, {})
    value, shares = values[rows].mean(), {}
    for row in rows:
        shares[prompts[row]] = shares.get(prompts[row], 0.0) + float(values[row] - value) / len(rows)
    return Mean(float(value), len(rows), shares)


def kinds_of(prompts: Sequence[str], words: rahf_prompts.Words) -> list[str]:
    """What each prompt names: "count, colour", "thing" where it is a thing alone, "other" where `words` cannot make it."""
    parsed = [words.parse(prompt) for prompt in prompts]
    return ["other" if found is None else rahf_prompts.kind(found) or "thing" for found in parsed]


# ---- Images ---------------------------------------------------------------------------------------------------------
def compute_features(features: Callable, images: Iterable[np.ndarray], total: int | None = None) -> np.ndarray:
    """float32[n, D] of any number of images, in batches; a progress bar of `total`. Errors as `measure`."""
    with tqdm(desc="features", unit="image", total=total, dynamic_ncols=True) as bar:
        found = []
        for batch in _batches(images):
            found.append(_features_of(features, batch))
            bar.update(len(batch))
    return _joined(found)


def measure(
    images: Iterable[np.ndarray],
    prompts: Sequence[str],
    *,
    features: Callable | None = None,
    reward: Callable | None = None,
    clip: embed.Clip | None = None,
    judge: Callable | None = None,
    desc: str = "evaluate",
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """What is told of each image, in one pass; arguments as `evaluate`.

    Returns:
      "reward", "clip_score", "alignment/all", "alignment/count", ... -> float[n], nan where a prompt says nothing of it; and
      the features float32[n, D], CLIP's embeddings where only they are given, else None.

    Raises:
      UserError: not as many images as prompts, an image that is not uint8[H, W, 3], a reward, features or a judge that
        give another shape or values that are not finite, a prompt too long for CLIP.
    """
    texts = clip.texts(list(dict.fromkeys(prompts))) if clip else None
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    found, rows, done = {}, [], 0
    with tqdm(desc=desc, unit="image", total=len(prompts), dynamic_ncols=True) as bar:
        for batch in _batches(images):
            part = list(prompts[done : done + len(batch)])
            done += len(batch)
            if len(part) != len(batch):
                raise UserError(f"images: got {done} or more for {len(prompts)} prompts, expected as many")
            told, embedded = {}, None
            if judge:
                told |= {f"alignment/{category}": verdict for category, verdict in _verdicts(judge, batch, part).items()}
            if reward:
                told["reward"] = sources.checked(reward, batch, part)
            if clip:
                embedded = clip.images(batch)
                told["clip_score"] = np.sum(embedded * texts[[numbers[prompt] for prompt in part]], axis=1)
            if features and not (clip and features == clip.images):
                embedded = _features_of(features, batch)
            for name, values in told.items():
                found.setdefault(name, []).append(values)
            rows.append(embedded)
            bar.update(len(batch))
    if done != len(prompts) or not done:
        raise UserError(f"images: got {done} for {len(prompts)} prompts, expected as many, and one or more")
    found = {name: np.concatenate(parts) for name, parts in found.items()}
    if wrong := sorted(name for name, values in found.items() if len(values) != done):
        raise UserError(f"judge: got {wrong} for some batches only, expected the same categories each time")
    return found, _joined(rows) if rows[0] is not None else None


def means(values: Mapping[str, np.ndarray], features, prompts, words=None) -> dict[str, Mean]:
    """The means of what `measure` gives: "reward/all", "reward/<kind>", ..., "diversity"."""
    found, kinds = {}, kinds_of(prompts, words) if words else []
    for name, of_images in values.items():
        key = name if name.startswith("alignment/") else f"{name}/all"
        found[key] = mean_of(of_images, prompts)
        if not name.startswith("alignment/") or name == "alignment/all":
            for kind in sorted(set(kinds)):
                rows = [i for i, other in enumerate(kinds) if other == kind]
                found[f"{name}/{kind}"] = mean_of(of_images[rows], [prompts[i] for i in rows])
    if features is not None:
        of_prompts = diversities(features, prompts)
        found["diversity"] = mean_of(list(of_prompts.values()), list(of_prompts))
    return found


def flat(found: Mapping[str, Mean]) -> dict[str, float]:
    """key, and key/se, key/n: the standard error and of how many."""
    return {
        name: value
        for key, mean in found.items()
        for name, value in ((key, mean.value), (f"{key}/se", mean.error), (f"{key}/n", float(mean.count)))
    }


def evaluate(
    images: Iterable[np.ndarray],
    prompts: Sequence[str],
    *,
    features: Callable | None = None,
    reference: np.ndarray | None = None,
    reward: Callable | None = None,
    clip: embed.Clip | None = None,
    judge: Callable | None = None,
    words: rahf_prompts.Words | None = None,
) -> dict[str, float]:
    """How good pictures are.

    Args:
      images: uint8[H, W, 3] each, any number and sizes; read once, in batches: uint8[B, H, W, 3], or a list where sizes
        differ, is what the functions below are called with. prompts: as many.
      features: (images) -> float[B, D], for FID and diversity; diversity is of CLIP's embeddings where it is not given.
      reference: float[m, D], the features of real pictures (`compute_features`), for FID.
      reward: (images, prompts) -> float[B].
      clip: for CLIP score, the cosine of the embeddings of image and prompt.
      judge: (images, prompts) -> {category: float[B], 1 right, 0 wrong, nan where the prompt says nothing of it}, one of
        the categories being "all".
      words: the lists that prompts are made of; with them means are told for each kind of prompt (`kinds_of`) too.

    Returns:
      What the arguments allow of: num_images; fid; diversity; reward/all, reward/<kind>; clip_score/all, clip_score/<kind>;
      alignment/all, alignment/all/<kind>, alignment/<category>. Every mean has <key>/se, its standard error, and <key>/n,
      the number of images that it is of (of prompts, for diversity).

    Raises:
      UserError: as `measure` and `frechet_distance`; a reference without features.
    """
    check_reference(reference, features)
    values, found = measure(images, prompts, features=features, reward=reward, clip=clip, judge=judge)
    return summary(means(values, found, prompts, words), found, len(prompts), reference)


def summary(found: Mapping[str, Mean], features, count: int, reference) -> dict[str, float]:
    """What `evaluate` returns."""
    fid = {} if reference is None else {"fid": frechet_distance(features, reference)}
    return {"num_images": float(count)} | fid | flat(found)


def check_reference(reference, features) -> None:
    """Refuses real pictures without a network, and images where features are expected."""
    if reference is not None and features is None:
        raise UserError("reference: got one without features, which FID is computed of; name a network as well")
    if reference is not None:
        _features("reference", reference)


def _features(name: str, values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise UserError(f"{name}: got shape {values.shape}, expected features [n, D], one row an image")
    if wrong := int(np.sum(~np.isfinite(values).all(axis=1))):
        raise UserError(f"{name}: got {wrong} of {len(values)} rows with values that are not finite")
    return values


def _features_of(features: Callable, batch) -> np.ndarray:
    found = np.asarray(features(batch))
    if found.ndim != 2 or len(found) != len(batch) or not np.isfinite(found).all():
        got = f"shape {found.shape}" if found.ndim != 2 or len(found) != len(batch) else "values that are not finite"
        raise UserError(f"features: got {got} of {len(batch)} images, expected finite [{len(batch)}, D]")
    return found.astype(np.float32)


def _verdicts(judge: Callable, batch, part) -> dict[str, np.ndarray]:
    verdicts = {category: np.asarray(verdict, np.float32) for category, verdict in judge(batch, part).items()}
    if "all" not in verdicts:
        raise UserError(f"judge: got {sorted(verdicts)}, expected 'all' among them: whether everything is right")
    for category, verdict in verdicts.items():
        if verdict.shape != (len(part),) or not (np.isin(verdict, (0, 1)) | np.isnan(verdict)).all():
            got = f"{verdict[:5]} of shape {verdict.shape}"
            raise UserError(f"judge: {category}: got {got}, expected {len(part)} of 0, 1 and nan")
    return verdicts


def _batches(images: Iterable[np.ndarray]) -> Iterator[np.ndarray | list]:
    images = iter(images)
    while batch := list(itertools.islice(images, BATCH)):
        for image in batch:
            drawing.check_image("images", image)
        yield np.stack(batch) if len({image.shape for image in batch}) == 1 else batch


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    if not parts or len({part.shape[1] for part in parts}) != 1:
        raise UserError(f"features: got {[part.shape for part in parts][:5]}, expected batches of one D, and one or more")
    return np.concatenate(parts)


# ---- The report -----------------------------------------------------------------------------------------------------
SHOWN, OF_EACH = 40, 4  # prompts of the report, images of one
INLINED_SIDE = 256  # pixels: longer sides are shrunk before they go into the page
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent.parent)


@dataclasses.dataclass
class Evaluated:
    """One set of pictures: what was found, and of some rows the picture (a data URI)."""

    name: str
    prompts: Sequence[str]
    values: Mapping[str, np.ndarray]
    means: Mapping[str, Mean]
    results: Mapping[str, float]
    shown: Mapping[int, str]


def table(sets: Sequence[Evaluated]) -> list[list[str]]:
    """Lines of cells, header first: what was found of each set, and the difference of each later one from the first."""
    first, *others = sets
    names = [one.name for one in sets]
    lines = [["", "n", *names, *([f"{one.name} - {first.name}" for one in others])]]
    keys = [key for key in ("num_images", "fid") if key in first.results]
    for key in (*keys, *dict.fromkeys(key for one in sets for key in one.means)):
        if key in keys:
            numbers = [one.results[key] for one in sets]
            text = "{:.0f}" if key == "num_images" else "{:.4g}"
            later = [f"{number - numbers[0]:+.4g}" for number in numbers[1:]] if key == "fid" else [""] * len(others)
            lines.append([key, "", *(text.format(number) for number in numbers), *later])
            continue
        found = [one.means.get(key) for one in sets]
        counts = list(dict.fromkeys(str(mean.count) if mean else "-" for mean in found))
        cells = [_plus_minus(mean, "{:.3f}") if mean else "-" for mean in found]
        later = [_plus_minus(mean - found[0], "{:+.3f}") if mean and found[0] else "-" for mean in found[1:]]
        lines.append([key, " / ".join(counts), *cells, *later])
    return lines


def _plus_minus(mean: Mean, text: str) -> str:
    error = "" if math.isnan(mean.error) else f" ± {mean.error:.3f}"
    return "-" if math.isnan(mean.value) else text.format(mean.value) + error


def shown_rows(prompts: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]]]:
    """The prompts that a report shows, spread evenly over those that all sets have, and the rows of each set to show.

    Raises:
      UserError: the sets have no prompt in common.
    """
    common = set.intersection(*map(set, prompts))
    shared = [text for text in dict.fromkeys(prompts[0]) if text in common]
    if not shared:
        got = " and ".join(repr(texts[0][:80]) for texts in prompts)
        raise UserError(
            f"images: the sets have no prompt in common, they begin with {got}; draw the same prompts with each"
        )
    count = min(SHOWN, len(shared))
    chosen = [shared[i * len(shared) // count] for i in range(count)]
    rows = []
    for texts in prompts:
        of = {text: [] for text in chosen}
        for row, text in enumerate(texts):
            if text in of and len(of[text]) < OF_EACH:
                of[text].append(row)
        rows.append([row for found in of.values() for row in found])
    return chosen, rows


def write_report(path, sets: Sequence[Evaluated], chosen: Sequence[str], words=None) -> None:
    """Writes one HTML page that needs no other file: the table, and the chosen prompts' pictures side by side."""
    kinds = kinds_of(chosen, words) if words else [""] * len(chosen)
    items = []
    for prompt, kind in zip(chosen, kinds, strict=True):
        columns = []
        for one in sets:
            rows = [row for row in one.shown if one.prompts[row] == prompt]
            columns.append([{"uri": one.shown[row], "told": _told(one.values, row)} for row in rows])
        items.append({"prompt": prompt, "kind": kind, "columns": columns})
    page = _TEMPLATES.get_template("generators.html.jinja").render(
        title="Generated pictures: " + ", ".join(one.name for one in sets),
        lines=table(sets),
        names=[one.name for one in sets],
        items=items,
        across=max(len(column) for item in items for column in item["columns"]),
        shared=len(set.intersection(*(set(one.prompts) for one in sets))),
    )
    paths.replace(path, page.encode())


def _told(values, row) -> list[str]:
    names = {"reward": "reward", "clip_score": "CLIP"}
    told = [f"{label} {values[name][row]:.2f}" for name, label in names.items() if name in values]
    if (verdict := values.get("alignment/all")) is not None and not np.isnan(verdict[row]):
        told.append("right" if verdict[row] else "wrong")
    return told


def _inlined(image: np.ndarray) -> str:
    image = drawing.shrink(image, INLINED_SIDE)
    if max(image.shape[:2]) > INLINED_SIDE // 2:
        return drawing.jpeg(image)
    done, data = cv2.imencode(".png", image[..., ::-1])  # a small picture's pixels are seen
    assert done
    return drawing.data_uri("image/png", data.tobytes())


# ---- The command ----------------------------------------------------------------------------------------------------
def _decoded(of: Pictures, rows=(), shown=None) -> Iterator[np.ndarray]:
    """A table's images; `shown` gets the pictures of `rows`."""
    rows = set(rows)
    for row, (where, encoded) in enumerate(of.images()):
        image = images.decode(encoded, where)
        if row in rows:
            shown[row] = _inlined(image)
        yield image


def compare(
    tables: Mapping[str, Pictures],
    output,
    *,
    features: Callable | None = None,
    reference: Pictures | None = None,
    reward: Callable | None = None,
    clip: embed.Clip | None = None,
    judge: Callable | None = None,
    words: rahf_prompts.Words | None = None,
) -> list[Evaluated]:
    """Evaluates sets of pictures; writes results.json and report.html into `output`.

    Args:
      tables: name -> pictures; differences are from the first. reference: real pictures, for FID.
      features, reward, clip, judge, words: as `evaluate`.

    Raises:
      UserError: as `measure`; sets without a prompt in common; nothing to compute. Nothing is written then.
    """
    if not (features or reward or clip or judge):
        raise UserError("got no reward, CLIP or features, expected one or more: --reward, --clip, --features")
    if reference and not features:
        raise UserError("reference: got a table without --features, the network that FID compares by; pass it as well")
    chosen, rows = shown_rows([one.prompts for one in tables.values()])
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    real = compute_features(features, _decoded(reference), len(reference)) if reference else None
    sets = []
    for (name, one), wanted in zip(tables.items(), rows, strict=True):
        shown = {}
        options = {"features": features, "reward": reward, "clip": clip, "judge": judge, "desc": name}
        values, found = measure(_decoded(one, wanted, shown), one.prompts, **options)
        told = means(values, found, one.prompts, words)
        results = summary(told, found, len(one), real)
        if sets:
            for key in told.keys() & sets[0].means.keys():
                difference = told[key] - sets[0].means[key]
                results |= {f"{key}/difference": difference.value, f"{key}/difference/se": difference.error}
        sets.append(Evaluated(name, one.prompts, values, told, results, shown))
    json_files.write(output / "results.json", {one.name: one.results for one in sets})
    write_report(output / "report.html", sets, chosen, words)
    return sets


def named(tables: Sequence[Pictures], given: Sequence[str]) -> dict[str, Pictures]:
    """The sets by name: as given, or the folder's or the file's."""
    files = [one.path.absolute() for one in tables]
    names = given or [file.parent.name if file.name == "images.jsonl" else file.stem for file in files]
    if len(names) != len(tables) or len(set(names)) != len(names) or not all(map(str.strip, names)):
        raise UserError(f"name: got {names} for {len(tables)} sets of images, expected a different --name for each")
    return dict(zip(names, tables, strict=True))


def run(args) -> list[Evaluated]:
    """`compare` as the command's flags say; raises UserError for faulty ones too."""
    tables = named([Pictures(path) for path in args.images], args.name)
    reference = Pictures(args.reference) if args.reference else None
    words = None
    if args.config is not None:
        if "prompts" not in args.config:
            raise UserError("config: has no section prompts, expected one such as configs/reward_clip.py")
        words = rahf_prompts.words_of(args.config.prompts)
    clip = embed.Clip(args.clip) if args.clip else None
    reward = sources.reward_of(args.reward) if args.reward else None
    same = clip is not None and args.features == f"clip:{args.clip}"
    features = clip.images if same else sources.features_of(args.features) if args.features else None
    options = {"features": features, "reference": reference, "reward": reward, "clip": clip, "words": words}
    return compare(tables, args.output, **options)


def main():
    """The command."""
    args = flags.FLAGS
    sets = run(args)
    header, *lines = table(sets)
    print(tabulate(lines, header, disable_numparse=True, colalign=("left", *["right"] * (len(header) - 1))))
    print(f"{args.output}: results.json, report.html")


if __name__ == "__main__":
    flags.DEFINE_multi_string("images", None, "A folder of rahf.diffusion.sample, or a .jsonl or .parquet; several times.")
    flags.DEFINE_multi_string("name", [], "What the pictures of an --images are called, in the same order.")
    flags.DEFINE_string("output", None, "The folder to write to.")
    flags.DEFINE_string("reference", None, "Real pictures for FID, a table as --images; needs --features.")
    flags.DEFINE_string("features", None, "The network of FID and diversity: clip:DIR or python:package.module:name.")
    flags.DEFINE_string("reward", None, "reward:DIR, rahf:DIR:plausibility or python:package.module:name.")
    flags.DEFINE_string("clip", None, "The CLIP of CLIP score, a folder that rahf.convert --source=clip-hf wrote.")
    flags.mark_flags_as_required(["images", "output"])
    command.run(main, experiments.reader(required=False))

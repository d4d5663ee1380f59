"""Evaluates the images of generators and compares them, for example before and after fine-tuning.

    python -m rahf.diffusion.evaluate --images=before --images=after --output=report \\
        --reward=reward:DIR --clip=DIR --reference=real.parquet --features=clip:DIR --config=reward_clip

prints a table and writes results.json and report.html, a page that shows the images of the same prompts side by side.
reward/image_table.py describes the formats of images, reward/specs.py those of rewards and features. In Python, `compare`
does the same and also takes a judge; `evaluate` takes images in memory. The metrics are in generator_metrics.py.

    python -m rahf.diffusion.evaluate --images=before --images=after --output=report \\
        --side_by_side=rahf:DIR:plausibility --margins=0.02,0.1 --responses=people.jsonl

tells how often the later set's picture is better than the first's (side_by_side.py): by the differences of a reward, and by
people who saw both.

Standard errors are over prompts, because images of one prompt are not independent. Differences are paired by prompt.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm.auto import tqdm

from rahf import experiments
from rahf.diffusion import side_by_side as pairs
from rahf.diffusion.comparison_page import Evaluated, inlined, shown_rows, table, verdicts_of, write_page
from rahf.diffusion.generator_metrics import Mean, checked_features, diversities, frechet_distance, mean_of
from rahf.reward import embed, specs
from rahf.reward import prompts as rahf_prompts
from rahf.reward.image_table import ImageTable
from richhf_data import command, drawing, json_files, paths
from richhf_data import images as richhf_images
from richhf_data.errors import UserError

BATCH = 32  # images at a time


def compute_features(features: Callable, images: Iterable[np.ndarray], total: int | None = None) -> np.ndarray:
    """The features of images, float32[n, D], computed in batches. Raises as `measure`.

    Args:
      total: n, for the progress bar.
    """
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
    side_by_side: Callable | None = None,
    desc: str = "evaluate",
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Measures each image, in one pass. Arguments as `evaluate`; side_by_side: as reward.

    Returns:
      "reward", "side_by_side", "clip_score", "alignment/all", "alignment/count", ... -> float[n], nan where a category does
      not apply; and the features, float32[n, D]: CLIP's embeddings if only CLIP is given, None if neither is.

    Raises:
      UserError: different numbers of images and prompts, an image that is not uint8[H, W, 3], a reward, features or a judge
        that return another shape or values that are not finite, a prompt too long for CLIP.
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
            measured, embedded = {}, None
            if judge:
                measured |= {f"alignment/{category}": verdict for category, verdict in _verdicts(judge, batch, part).items()}
            if reward:
                measured["reward"] = specs.checked(reward, batch, part)
            if side_by_side:
                with json_files.named("side_by_side"):
                    same = side_by_side is reward
                    measured["side_by_side"] = measured["reward"] if same else specs.checked(side_by_side, batch, part)
            if clip:
                embedded = clip.images(batch, [f"image {i}" for i in range(done - len(batch), done)])
                measured["clip_score"] = np.sum(embedded * texts[[numbers[prompt] for prompt in part]], axis=1)
            if features and not (clip and features == clip.images):
                embedded = _features_of(features, batch)
            for name, values in measured.items():
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
    """The means of the results of `measure`: "reward/all", "reward/<kind>", ..., "diversity"."""
    found, kinds = {}, words.kinds(prompts) if words else []
    for name, of_images in values.items():
        if name == "side_by_side":
            continue  # of pairs, not of a set
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
    """key: value, key/se: its standard error, key/n: the number of images."""
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
    """Evaluates images in memory.

    The functions below are called with batches of images: uint8[B, H, W, 3], or a list if their sizes differ.

    Args:
      images: each uint8[H, W, 3], of any size; iterated over once. prompts: one per image.
      features: (images) -> float[B, D], for FID and diversity. Without it, diversity uses CLIP's embeddings.
      reference: float[m, D], the features of real images (`compute_features`), for FID.
      reward: (images, prompts) -> float[B].
      clip: for CLIP score, the cosine of the embeddings of image and prompt.
      judge: (images, prompts) -> {category: float[B]}, 1 = right, 0 = wrong, nan = the prompt does not name the category.
        One category is "all".
      words: the words of the prompts; adds means for each kind of prompt (`Words.kinds`).

    Returns:
      Those that the arguments allow of: num_images; fid; diversity; reward/all, reward/<kind>; clip_score/all,
      clip_score/<kind>; alignment/all, alignment/all/<kind>, alignment/<category>. Each mean <key> also has its standard
      error, <key>/se, and its number of images, <key>/n (of prompts, for diversity).

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
    """Raises UserError for a reference without features, or one that is not a table of features."""
    if reference is not None and features is None:
        raise UserError("reference: got one without features, which FID needs; pass the network as well")
    if reference is not None:
        checked_features("reference", reference)


def _features_of(features: Callable, batch) -> np.ndarray:
    expected = f"expected finite [{len(batch)}, D]"
    found = specs.as_floats("features", features(batch), expected)
    if found.ndim != 2 or len(found) != len(batch) or not np.isfinite(found).all():
        got = f"shape {found.shape}" if found.ndim != 2 or len(found) != len(batch) else "values that are not finite"
        raise UserError(f"features: got {got} of {len(batch)} images, {expected}")
    return found


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


# ---- The command ----------------------------------------------------------------------------------------------------
def _decoded(of: ImageTable, rows=(), shown=None) -> Iterator[np.ndarray]:
    """The images of a table. Puts those of `rows` into `shown` as data URIs."""
    rows = set(rows)
    for row, (where, encoded) in enumerate(of.images()):
        image = richhf_images.decode(encoded, where)
        if row in rows:
            shown[row] = inlined(image)
        yield image


def compare(
    tables: Mapping[str, ImageTable],
    output,
    *,
    features: Callable | None = None,
    reference: ImageTable | None = None,
    reward: Callable | None = None,
    clip: embed.Clip | None = None,
    judge: Callable | None = None,
    words: rahf_prompts.Words | None = None,
    side_by_side: Callable | None = None,
    margins: Sequence[float] = pairs.MARGINS,
    responses=None,
) -> list[Evaluated]:
    """Evaluates sets of images and writes results.json and report.html into `output`.

    Args:
      tables: name -> images. Each later set is compared with the first. reference: real images, for FID.
      features, reward, clip, judge, words: as `evaluate`.
      side_by_side: (images, prompts) -> float[B], whose differences of at least `margins` tell which picture of a pair is
        better (`from_scores`). responses: a file of people's responses (`read_responses`). The verdicts are in
        `Evaluated.verdicts`, and in the later sets' results as side_by_side/<key> and responses/<key> (`Verdict.flat`).

    Raises:
      UserError: as `measure`, `from_scores` and `read_responses`; sets without a prompt in common; one set and nothing to
        compare it with; nothing to compute. Nothing is written in these cases.
    """
    if not (features or reward or clip or judge or side_by_side or responses):
        flags_of = "--reward, --clip, --features, --side_by_side, --responses"
        raise UserError(f"got no reward, CLIP or features, expected one or more: {flags_of}")
    if (side_by_side or responses) and len(tables) < 2:
        given = "side_by_side" if side_by_side else "responses"
        raise UserError(f"{given}: got {len(tables)} set of images, expected two or more to compare; repeat --images")
    margins = pairs.checked_margins(margins)
    answered = pairs.read_responses(responses, list(tables)) if responses else {}
    if reference and not features:
        raise UserError("reference: got a table without --features, the network that FID needs; pass it as well")
    chosen, rows = shown_rows([one.prompts for one in tables.values()])
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    real = compute_features(features, _decoded(reference), len(reference)) if reference else None
    sets = []
    for (name, one), wanted in zip(tables.items(), rows, strict=True):
        shown = {}
        options = {"features": features, "reward": reward, "clip": clip, "judge": judge, "side_by_side": side_by_side}
        values, found = measure(_decoded(one, wanted, shown), one.prompts, desc=name, **options)
        of_set = means(values, found, one.prompts, words)
        results, verdicts = summary(of_set, found, len(one), real), {}
        if sets:
            if side_by_side:
                before, after = pairs.paired(sets[0].prompts, one.prompts)
                scores = sets[0].values["side_by_side"][before], values["side_by_side"][after]
                by_score = pairs.from_scores(*scores, margins)
                verdicts["side_by_side"] = pairs.verdict(by_score, [one.prompts[row] for row in after])
            if name in answered:
                verdicts["responses"] = pairs.verdict(*answered[name])
            for source, verdict in verdicts.items():
                results |= verdict.flat(source)
            for key in of_set.keys() & sets[0].means.keys():
                difference = of_set[key] - sets[0].means[key]
                results |= {f"{key}/difference": difference.value, f"{key}/difference/se": difference.error}
        sets.append(Evaluated(name, one.prompts, values, of_set, results, shown, verdicts))
    json_files.write(output / "results.json", {one.name: one.results for one in sets})
    write_page(output / "report.html", sets, chosen, words)
    return sets


def named(tables: Sequence[ImageTable], given: Sequence[str]) -> dict[str, ImageTable]:
    """The sets by name: the given names, or by default those of their folders or files."""
    files = [one.path.absolute() for one in tables]
    names = given or [file.parent.name if file.name == "images.jsonl" else file.stem for file in files]
    if len(names) != len(tables) or len(set(names)) != len(names) or not all(map(str.strip, names)):
        raise UserError(f"name: got {names} for {len(tables)} sets of images, expected a different --name for each")
    return dict(zip(names, tables, strict=True))


def run(args) -> list[Evaluated]:
    """Runs `compare` with the command's flags. Also raises UserError for faulty flags."""
    tables = named([ImageTable(path) for path in args.images], args.name)
    reference = ImageTable(args.reference) if args.reference else None
    words = None
    if args.config is not None:
        if "prompts" not in args.config:
            raise UserError("config: has no section prompts, expected one such as configs/reward_clip.py")
        words = rahf_prompts.words_of(args.config.prompts)
    clip = embed.Clip(args.clip) if args.clip else None
    reward = specs.reward_of(args.reward) if args.reward else None
    same = clip is not None and args.features == f"clip:{args.clip}"
    features = clip.images if same else specs.features_of(args.features) if args.features else None
    if args.margins is not None and not args.side_by_side:
        raise UserError("margins: got some without --side_by_side, whose differences they are of; pass it as well")
    side_by_side = reward if args.side_by_side == args.reward else None
    if args.side_by_side and not side_by_side:
        with json_files.named("side_by_side"):
            side_by_side = specs.reward_of(args.side_by_side)
    options = {"features": features, "reference": reference, "reward": reward, "clip": clip, "words": words}
    options |= {"side_by_side": side_by_side, "responses": args.responses}
    return compare(tables, args.output, margins=pairs.MARGINS if args.margins is None else args.margins, **options)


def _printed(header, *lines) -> str:
    return tabulate(lines, header, disable_numparse=True, colalign=("left", *["right"] * (len(header) - 1)))


def main():
    """The command."""
    args = flags.FLAGS
    with paths.locked(args.output):
        sets = run(args)
    tables = filter(None, (table(sets), verdicts_of(sets)))
    print("\n\n".join(_printed(*lines) for lines in tables))
    print(f"{args.output}: results.json, report.html")


if __name__ == "__main__":
    flags.DEFINE_multi_string("images", None, "A folder of rahf.diffusion.sample, a .jsonl or a .parquet; repeatable.")
    flags.DEFINE_multi_string("name", [], "A name for each --images, in the same order.")
    flags.DEFINE_string("output", None, "The folder to write to.")
    flags.DEFINE_string("reference", None, "Real images for FID, in a format of --images; needs --features.")
    flags.DEFINE_string("features", None, "The network of FID and diversity: clip:DIR or python:package.module:name.")
    flags.DEFINE_string("reward", None, "reward:DIR, rahf:DIR:plausibility or python:package.module:name.")
    flags.DEFINE_string("clip", None, "The CLIP for CLIP score, a folder that rahf.convert --source=clip-hf wrote.")
    flags.DEFINE_string("side_by_side", None, "A reward that tells the better picture of a pair, in a form of --reward.")
    flags.DEFINE_list("margins", None, "Its least differences of slightly and significantly better; 0.02,0.1 by default.")
    flags.DEFINE_string("responses", None, "A .jsonl of people's responses to pairs (rahf/diffusion/side_by_side.py).")
    flags.mark_flags_as_required(["images", "output"])
    command.run(main, experiments.reader(required=False))

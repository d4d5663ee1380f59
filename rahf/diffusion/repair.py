"""Repairs pictures where a critic sees a flaw: predict, mask, draw anew inside of the mask, keep what is better.

    python -m rahf.diffusion.repair --model=DIR --critic=rahf:DIR --images='photos/*.png' --prompt='a cat' --output=OUT
    python -m rahf.diffusion.repair --model=DIR --critic=rahf:DIR --images=own/images.jsonl --output=OUT [--rounds=2]

The critic's heatmap becomes a mask (regions.py). Inside of it, a Stable Diffusion draws several candidates: an inpainting
model, or any other, which then keeps the surroundings at each step. The candidate with the highest score takes the picture's
place if it is better by a margin. Outside of the mask the picture stays bit for bit. Source: section 5 of paper A, which
gives no threshold, dilation, margin or number of candidates.

    OUT/00000.png, ...     the pictures, repaired or as they were; images.jsonl lists them for the other commands
    OUT/00000_mask.png     where a repaired one may differ, white
    OUT/repairs.jsonl      one line a picture: status, scores before and after, share of the mask, rounds, seeds
    OUT/report.html        original, heatmap, mask, candidates with their scores, result

A status is one of `STATUSES`. Give the same command again to continue a killed run. In Python: `repair`.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm.auto import tqdm

from rahf.diffusion import folder, regions, sample
from rahf.diffusion.schedule import SAMPLERS, plan
from rahf.predict import FAILED, read_inputs
from rahf.reward import specs
from richhf_data import checked, command, drawing, images, json_files, jsonl, paths, ranges, schema
from richhf_data.errors import UserError

STATUSES = {
    "repaired": "a candidate was better",
    "kept": "no candidate was better by the margin",
    "clean": "no flaw of the smallest size reaches the threshold",
    "too large": "the mask is larger than --largest, or too long for a square window",
    "failed": "the picture cannot be read",
}
SCORES_OF = {"implausibility": "plausibility", "misalignment": "alignment", "both": "plausibility,alignment"}
CANDIDATES, ROUNDS = ranges.Range(1, 64, whole=True), ranges.Range(1, 8, whole=True)
SHOWN, SIDE = 100, 256  # pictures on the page, and pixels of their longer side
_TEMPLATES = drawing.templates(pathlib.Path(__file__).parent.parent)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a picture is repaired. Shares of a side are of the shorter one."""

    region: Literal["implausibility", "misalignment", "both"] = "implausibility"
    threshold: Annotated[float, ranges.SOME_SHARE] = 0.3  # a heatmap's value from here on is a flaw
    dilation: Annotated[float, ranges.SHARE] = 0.03  # by which the flaw grows, share of a side
    feather: Annotated[float, ranges.SHARE] = 0.02  # the soft edge inside of the mask, share of a side
    smallest: Annotated[float, ranges.SHARE] = 0.001  # smaller flaws are ignored, share of the picture
    largest: Annotated[float, ranges.SOME_SHARE] = 0.5  # larger masks are not drawn, share of the picture
    context: Annotated[float, ranges.Range(1, 100)] = 2.0  # what is drawn is so many times as wide as the flaw
    size: Annotated[int, ranges.PIXELS] | None = None  # pixels that are drawn, both sides; None: the model's
    candidates: Annotated[int, CANDIDATES] = 4
    margin: Annotated[float, ranges.SHARE] = 0.0  # by which a candidate's score must be higher
    rounds: Annotated[int, ROUNDS] = 1  # until nothing reaches the threshold
    add_words: bool = False  # write the prompt's misaligned words after it
    steps: Annotated[int, ranges.COUNT] = 50
    sampler: Literal[SAMPLERS] = "ddim"
    guidance_scale: Annotated[float, ranges.GUIDANCE] = 7.5
    negative_prompt: str = ""
    strength: Annotated[float, ranges.SOME_SHARE] = 1.0
    seed: Annotated[int, ranges.SEED] = 0
    truncate: bool = False

    def __post_init__(self):
        checked.fields(self, "repair")


@dataclasses.dataclass(frozen=True)
class Round:
    """One attempt.

    Attributes:
      mask: bool[H, W]. prompt, seed, numbers: what the candidates were drawn with. numbers: of each window, `first` of
        `sample.generate`.
      pictures: the candidates, uint8[H, W, 3] each. scores: theirs. chosen: index of the one that was taken, or None.
    """

    mask: np.ndarray
    prompt: str
    seed: int
    numbers: list[int]
    pictures: list[np.ndarray]
    scores: list[float]
    chosen: int | None


@dataclasses.dataclass(frozen=True)
class Repair:
    """What became of a picture.

    Attributes:
      status: of `STATUSES`. image: uint8[H, W, 3]. mask: bool[H, W], where it may differ from the original.
      heatmap: float32[h, w], that of the original. before, after: scores.
      share: of the picture, the largest mask of a round, drawn or not.
    """

    status: str
    image: np.ndarray
    mask: np.ndarray
    heatmap: np.ndarray
    before: float
    after: float
    share: float
    rounds: list[Round]


def heatmap_of(feedback, row: int, region: str) -> np.ndarray:
    """The heatmap of a region, float32[h, w]; of both, the larger value."""
    names = schema.HEATMAPS if region == "both" else (region,)
    return np.max([feedback.heatmaps[name][row] for name in names], axis=0)


def repair(
    model: folder.StableDiffusion,
    critic: specs.ScoreReward,
    image: np.ndarray,
    prompt: str,
    options: Options = Options(),
    *,
    number: int = 0,
) -> Repair:
    """Repairs one picture.

    Args:
      critic: of `specs.critic_of`: its `model` predicts feedback, its `of_feedback` makes a score of it.
      image: uint8[H, W, 3] of any size. number: of the picture, which the seed depends on.

    Raises:
      UserError: as `check`; a prompt that is too long for the generator or the critic.
    """
    config = model.config
    size = options.size or config.unet.sample_size * config.vae.factor
    check(config, options)
    shorter = min(image.shape[:2])

    def judged(pictures):
        feedback = critic.model.predict(pictures, [prompt] * len(pictures))
        return feedback, critic.of_feedback(feedback)

    feedback, scores = judged([image])
    row, current, rounds, drawn = 0, image, [], np.zeros(image.shape[:2], bool)
    first, before, share, refused = heatmap_of(feedback, 0, options.region), float(scores[0]), 0.0, False
    for attempt in range(options.rounds):
        heatmap = heatmap_of(feedback, row, options.region)
        mask = regions.mask_of(heatmap, image.shape[:2], options.threshold, options.dilation, options.smallest)
        share = max(share, float(mask.mean()))
        windows = regions.windows_of(mask, size, options.context)
        refused = mask.mean() > options.largest or any(one.side**2 > images.MAX_PIXELS for one in windows)
        if refused or not mask.any():
            break
        text = _with_words(model, prompt, feedback.keywords[row]) if options.add_words else prompt
        seed = int(np.random.SeedSequence((options.seed, number)).generate_state(1)[0])
        shows, numbers = regions.opacity(mask, options.feather * shorter), []
        pictures = [current.copy() for _ in range(options.candidates)]
        for place, window in enumerate(windows):
            numbers.append((attempt * regions.MAX_WINDOWS + place) * options.candidates)
            found = sample.generate(
                model,
                [text] * options.candidates,
                seed=seed,
                first=numbers[-1],
                negative_prompt=options.negative_prompt,
                steps=options.steps,
                sampler=options.sampler,
                guidance_scale=options.guidance_scale,
                image=regions.scaled(regions.cut(current, window), size),
                mask=regions.to_draw(mask, window, size, config.vae.factor),
                strength=options.strength,
                truncate=options.truncate,
            )
            for picture, pixels in zip(pictures, found, strict=True):
                regions.put_back(picture, pixels, window, shows)
        of_candidates, candidates = judged(pictures)
        best = int(np.argmax(candidates))
        better = candidates[best] > scores[row] and candidates[best] - scores[row] >= options.margin
        rounds.append(Round(mask, text, seed, numbers, pictures, candidates.tolist(), best if better else None))
        if better:
            row, current, feedback, scores, drawn = best, pictures[best], of_candidates, candidates, drawn | mask
    status = "repaired" if drawn.any() else "kept" if rounds else "too large" if refused else "clean"
    return Repair(status, current, drawn, first, before, float(scores[row]), share, rounds)


def _with_words(model: folder.StableDiffusion, prompt: str, words: Sequence[str]) -> str:
    """The prompt, followed by its misaligned words if there are any and the text encoder reads as many."""
    longer = f"{prompt}, {', '.join(words)}" if words else prompt
    try:
        model.text_ids([longer])
    except UserError:
        return prompt
    return longer


def check(config: folder.Config, options: Options) -> None:
    """Refuses what the generator cannot draw: a size that the VAE's factor does not divide, a sampler's wrong steps."""
    size = options.size or config.unet.sample_size * config.vae.factor
    config.vae.grid(size, size)
    if size**2 > images.MAX_PIXELS:
        raise UserError(f"size: got {size}, expected at most {images.MAX_PIXELS:,} pixels in all")
    plan(config.schedule, options.sampler, options.steps, options.strength)


# ---- The command ----------------------------------------------------------------------------------------------------
def run(args, options: Options) -> int:
    """Repairs all images and writes the output folder; returns how many failed.

    Raises:
      UserError: no images, an image without a prompt, an output folder of another run; as `repair`.
    """
    inputs = read_inputs(args.images, args.prompt)
    critic = specs.critic_of(args.critic, SCORES_OF[options.region])
    if options.add_words:
        critic.model.require(f"critic: {args.critic}", "keywords")
    model = folder.read(args.model)
    for prompt in dict.fromkeys(prompt for _, prompt in inputs):  # raises for a prompt that is too long
        model.text_ids([prompt], options.truncate)
        critic.model.text_ids(prompt)
    check(model.config, options)
    if options.guidance_scale > 1:
        model.text_ids([options.negative_prompt], options.truncate)
    output = pathlib.Path(args.output)
    if own := [path for path, _ in inputs if paths.contains(output, path)]:
        raise UserError(f"images: {own[0]} is in {output}, where this command writes; choose another --output")
    if not (output / "records").is_dir() and any(output.glob("*.png")):
        raise UserError(f"output: {output} holds images of another command; choose another folder")
    states = [[path, prompt, *_state(path)] for path, prompt in inputs]
    settings = {"images": states, "critic": critic.identity, "model": sample.files_of(args.model)}
    sample.open_output(output, settings | {"repair": dataclasses.asdict(options)}, "records/*.json")
    records = [output / "records" / f"{number:05d}.json" for number in range(len(inputs))]
    done = [_is_done(record, output) for record in records]
    with tqdm(desc="repair", unit="image", total=len(inputs), initial=sum(done), dynamic_ncols=True) as bar:
        for number, ((path, prompt), record) in enumerate(zip(inputs, records, strict=True)):
            if done[number]:
                continue
            json_files.write(record, _repaired(model, critic, path, prompt, options, number, output))
            bar.update()
    found = [json_files.read(record) for record in records]
    lines = [one["line"] for one in found]
    jsonl.write(output / "repairs.jsonl", lines)
    written = [line for line in lines if line["status"] != "failed"]
    jsonl.write(output / "images.jsonl", [{name: line[name] for name in ("image", "prompt")} for line in written])
    cells = table(lines)
    views = [one["view"] for one in found if one["view"]]
    page = _TEMPLATES.get_template("repairs.html.jinja").render(
        title="Repaired pictures", lines=cells, items=views, count=len(written), statuses=STATUSES
    )
    paths.replace(output / "report.html", page.encode(errors="backslashreplace"))
    print(tabulate(cells[1:], cells[0], disable_numparse=True))
    print(f"{output}: repairs.jsonl, report.html, images.jsonl, {len(written)} pictures")
    for line in [line for line in lines if line["status"] == "failed"]:
        print(f"failed: {line['source']}: {line['reason']}")
    return len(lines) - len(written)


def _is_done(record: pathlib.Path, output: pathlib.Path) -> bool:
    """Whether a picture's record and its files are there."""
    if not record.is_file():
        return False
    line = json_files.read(record)["line"]
    return all((output / line[name]).is_file() for name in ("image", "mask") if line.get(name))


def _state(path: str) -> list:
    with_stat = os.path.isfile(path)
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns] if with_stat else [None, None]


def _repaired(model, critic, path, prompt, options, number, output) -> dict:
    """Repairs one file and writes its picture: {"line": of repairs.jsonl, "view": of the page, or None}."""
    line = {"source": path, "prompt": prompt}
    try:
        encoded = images.read_bytes(path)
        image = images.decode(encoded, path)
    except UserError as error:
        return {"line": line | {"status": "failed", "reason": str(error)}, "view": None}
    found = repair(model, critic, image, prompt, options, number=number)
    if found.status == "repaired":
        name, mask = f"{number:05d}.png", f"{number:05d}_mask.png"
        paths.replace(output / mask, images.png(found.mask.astype(np.uint8) * 255))
        paths.replace(output / name, images.png(found.image))
    else:
        name, mask = f"{number:05d}.{images.extension(encoded)}", None
        paths.replace(output / name, encoded)
    rounds = [
        {
            "mask_share": round(float(one.mask.mean()), 6),
            "prompt": one.prompt,
            "seed": one.seed,
            "numbers": one.numbers,
            "scores": [round(score, 6) for score in one.scores],
            "chosen": one.chosen,
        }
        for one in found.rounds
    ]
    line |= {"status": found.status, "image": name, "mask": mask, "mask_share": round(found.share, 6)}
    line |= {"score_before": round(found.before, 6), "score_after": round(found.after, 6), "rounds": rounds}
    return {"line": line, "view": _view(image, found, line) if number < SHOWN else None}


def _view(image: np.ndarray, found: Repair, line: dict) -> dict:
    """What the page shows of a picture."""
    small = functools.partial(drawing.shrink, side=SIDE)
    pictures = [
        ("original", f"score {found.before:.3f}", image),
        ("heatmap", f"peak {found.heatmap.max():.2f}", drawing.overlay(small(image), found.heatmap)),
    ]
    for number, one in enumerate(found.rounds, 1):
        of_round = f"round {number}, " if len(found.rounds) > 1 else ""
        veiled = np.where(one.mask[..., None], image, image // 4 + 160)
        pictures.append((f"{of_round}mask", f"{100 * one.mask.mean():.1f} % of the picture", veiled))
        for index, (picture, score) in enumerate(zip(one.pictures, one.scores, strict=True)):
            taken = ", taken" if index == one.chosen else ""
            pictures.append((f"{of_round}candidate {index + 1}", f"score {score:.3f}{taken}", picture))
    pictures.append(("result", f"{found.status}, score {found.after:.3f}", found.image))
    shown = [{"caption": caption, "note": note, "uri": drawing.jpeg(small(pixels))} for caption, note, pixels in pictures]
    return {"prompt": line["prompt"], "name": line["source"], "status": found.status, "pictures": shown}


def table(lines: Sequence[dict]) -> list[list[str]]:
    """Lines of cells, header first: for each status the number of pictures, and their mean scores and mask."""
    cells = [["status", "pictures", "score before", "after", "mask, %", ""]]
    for status, meaning in STATUSES.items():
        of = [line for line in lines if line["status"] == status]
        if not of:
            continue
        names = ("score_before", "score_after", "mask_share") if status != "failed" else ()
        means = [np.mean([line[name] for line in of]) for name in names]
        numbers = [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{100 * means[2]:.1f}"] if names else ["-"] * 3
        cells.append([status, str(len(of)), *numbers, meaning])
    return cells


def main():
    """The command."""
    args = flags.FLAGS
    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    with paths.locked(args.output):
        failed = run(args, options)
    if failed:
        raise SystemExit(FAILED)


if __name__ == "__main__":
    default = Options()
    flags.DEFINE_string("model", None, "A diffusers folder of Stable Diffusion, for inpainting or not.")
    flags.DEFINE_string(
        "critic", None, "rahf:DIR, a RAHF; its score decides, by default that of --region, or rahf:DIR:overall."
    )
    flags.DEFINE_string("images", None, "Image files, a path or a pattern; or a .jsonl file of {image, prompt} lines.")
    flags.DEFINE_string("prompt", None, "The prompt of all images of a pattern; else each image's own NAME.txt.")
    flags.DEFINE_string("output", None, "The folder to write to.")
    flags.DEFINE_enum("region", default.region, list(SCORES_OF), "Which heatmap says what is drawn anew.")
    ranges.flag("threshold", default.threshold, "A heatmap's value from which on it is a flaw.", ranges.SOME_SHARE)
    ranges.flag("dilation", default.dilation, "By which a flaw grows, as a share of the shorter side.", ranges.SHARE)
    ranges.flag("feather", default.feather, "The soft edge inside of the mask, as such a share.", ranges.SHARE)
    ranges.flag("smallest", default.smallest, "Smaller flaws are ignored; a share of the picture.", ranges.SHARE)
    ranges.flag("largest", default.largest, "Larger masks are not drawn; a share of the picture.", ranges.SOME_SHARE)
    ranges.flag("context", default.context, "What is drawn is so many times as wide as the flaw.", ranges.Range(1, 100))
    ranges.flag("size", None, "Pixels that are drawn, both sides; by default the model's.", ranges.PIXELS)
    ranges.flag("candidates", default.candidates, "Candidates of a round, drawn as one batch.", CANDIDATES)
    ranges.flag("margin", default.margin, "By which a candidate's score must be higher.", ranges.SHARE)
    ranges.flag("rounds", default.rounds, "Rounds, until nothing is above the threshold.", ROUNDS)
    flags.DEFINE_bool("add_words", default.add_words, "Write the prompt's misaligned words after it.")
    ranges.flag("steps", default.steps, "The number of steps from pure noise to an image.", ranges.COUNT)
    flags.DEFINE_enum("sampler", default.sampler, SAMPLERS, "The sampler; dpm++ needs about half the steps.")
    ranges.flag("guidance_scale", default.guidance_scale, "Weight of classifier-free guidance.", ranges.GUIDANCE)
    flags.DEFINE_string("negative_prompt", default.negative_prompt, "A prompt that guidance leads away from.")
    ranges.flag("strength", default.strength, "Change inside of the mask; 1 starts from noise.", ranges.SOME_SHARE)
    ranges.flag("seed", default.seed, "The seed of the noise.", ranges.SEED)
    flags.DEFINE_bool("truncate", default.truncate, "Drop the end of prompts that are too long.")
    flags.mark_flags_as_required(["model", "critic", "images", "output"])
    command.run(main)

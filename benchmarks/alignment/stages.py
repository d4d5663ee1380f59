"""Stages that the measured loops share: the parts before the diffusion model, the base model, pictures drawn by it."""

import io
import pathlib
import time
from collections.abc import Callable

import numpy as np
import pyarrow

from benchmarks.alignment import drawings, foundation
from rahf.diffusion import folder, inputs, sample
from rahf.diffusion import train as diffusion_train
from richhf_data import json_files

AT_ONCE = 100  # pictures drawn in one batch


def seed_of(config, number: int) -> int:
    """The seed number `number`, derived from `config.seed`."""
    return 1000 * config.seed + number


def make_start(config, root: pathlib.Path, clip_steps: int = 600) -> None:
    """Trains the CLIP and the VAE, and writes the untrained diffusion model."""
    table = drawings.read(root / "pictures/train.parquet")
    if not (root / "clip/config.json").is_file():
        images, texts = drawings.images(table), table["prompt"].to_pylist()
        foundation.fit_clip(root / "clip", images, texts, steps=clip_steps, seed=seed_of(config, 20))
    if not (root / "start" / folder.INDEX).is_file():
        vae = foundation.fit_vae(drawings.images(table), seed=seed_of(config, 30))
        foundation.start(root / "start", root / "clip", vae, seed=seed_of(config, 40))


def fit_base(config, root: pathlib.Path) -> None:
    """Trains the diffusion model on the wrongly captioned pictures."""
    settings = config.base.copy_and_resolve_references()
    settings.seed = seed_of(config, 0)
    settings.model.folder, settings.data.pretraining = str(root / "start"), str(root / "pictures/train.parquet")
    diffusion_train.train(settings, root / "base", cache=root / "cache")


def drawn(model_folder, texts: list[str], seed: int, sampling, place: pathlib.Path) -> np.ndarray:
    """uint8[n, S, S, 3]: a picture of each prompt, kept in a file; resumes where a killed run ended."""
    size = drawings.SIZE

    def parts(done):
        model = folder.read(model_folder)

        def images():
            for first in range(done, len(texts), AT_ONCE):
                part = texts[first : first + AT_ONCE]
                padded = part + part[-1:] * (AT_ONCE - len(part))  # one compiled shape
                yield from sample.to_uint8(sample.generate(model, padded, seed=seed, first=first, **sampling))[: len(part)]

        return inputs.parts_of(images(), AT_ONCE, f"draw {place.stem}", len(texts), done)

    return np.asarray(inputs.kept(place, (len(texts), size, size, 3), parts, np.uint8))


def write_table(file: pathlib.Path, images, texts, **columns) -> None:
    """Writes a .parquet table of pictures."""
    drawings.write(pyarrow.table({"prompt": texts, "image": list(map(drawings.png, images)), **columns}), file)


class Timed:
    """Runs stages and keeps the seconds of each in a file, over all runs of the command."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        self.seconds = json_files.read(file) if file.is_file() else {}

    def __call__(self, name: str, function: Callable, *args, unless: pathlib.Path | None = None):
        """What the function returns; None if the file `unless`, which marks a finished stage, is there."""
        print(f"== {name}", flush=True)
        start = time.monotonic()
        try:
            return None if unless and unless.is_file() else function(*args)
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - start
            json_files.write(self._file, self.seconds)

    def summary(self) -> str:
        """A line with the minutes of each stage."""
        each = ", ".join(f"{name} {value / 60:.1f}" for name, value in self.seconds.items())
        return f"Minutes: {each}; {sum(self.seconds.values()) / 60:.0f} in all"


def png_of(figure, dpi: int) -> bytes:
    """A figure of matplotlib, encoded."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()

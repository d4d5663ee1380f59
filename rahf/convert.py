"""Converts weights in the formats of other projects to a folder that RAHF reads.

    python -m rahf.convert --source=vit-npz --input=ViT-B_16.npz --output=DIR
    python -m rahf.convert --source=t5x     --input=gs://t5-data/.../checkpoint_1000000 --output=DIR

writes DIR/weights.safetensors, with our parameter names, and DIR/config.json, the model's configuration. Training starts
from such folders (pretrained.py) with `--config.init.vit=DIR` and `--config.init.t5=DIR`. A RAHF's folder also holds its
vocabulary and predict.stablehlo (export.py), a CLIP's the files of its tokenizer.

Names and shapes are checked before anything is written. One tensor is in memory at a time. The files are written beside an
earlier conversion's, in DIR/.partial, and take their places when all are complete.
"""

import json
import os
import pathlib

import numpy as np
from absl import flags

from rahf import export, predictor, pretrained, weights, workdirs
from rahf.models.rahf import RAHFConfig
from rahf.pretrained import Pretrained
from rahf.readers import READERS
from richhf_data import clip_tokenizer, command, json_files, paths, ranges
from richhf_data import vocabulary as vocabularies
from richhf_data.errors import UserError

FILES = {"vit": (), "t5": (), "clip": clip_tokenizer.FILES, "rahf": ("vocabulary.model", "predict.stablehlo")}  # besides:
COMMON = ("weights.safetensors", "config.json")  # the last one marks a complete folder


def convert(source: str, path, output, vocabulary=None, timeout: float = weights.TIMEOUT) -> Pretrained:
    """Reads weights and writes the folder `output`.

    Args:
      source: a key of `READERS`. path: the file or folder to read.
      vocabulary: T5's SentencePiece model, for `source="rahf-pytorch"`.
      timeout: seconds that an address may take to answer, for `source="t5x"`.

    Raises:
      UserError: an input that is not of the format `source`; a RAHF without a vocabulary, or with too large a one; an output
        folder with a file of these names that is not an earlier conversion's; another process writes there.
    """
    options = {"timeout": timeout} if source == "t5x" else {}
    converted, output = READERS[source](path, **options), pathlib.Path(output)
    paths.finish_exchange(output)
    replaced = _replaced(converted.kind, path, output)
    if converted.kind == "rahf":
        if source == "workdir":
            vocabulary = workdirs.verified(pathlib.Path(path) / "vocabulary.model")
        elif not vocabulary:
            raise UserError(f"vocabulary: got none, {path} needs the SentencePiece model of its T5; pass --vocabulary=PATH")
        vocabulary = vocabularies.Vocabulary(vocabulary)
        predictor.check_vocabulary(RAHFConfig.from_dict(converted.config["model"]), vocabulary)
    with paths.exchanging(output, replaced) as partial:
        if converted.kind == "rahf":
            vocabulary.copy(partial / "vocabulary.model")
            export.export_stablehlo(converted, partial / "predict.stablehlo")
        if converted.kind == "clip":
            folder = pathlib.Path(path) if pathlib.Path(path).is_dir() else pathlib.Path(path).parent
            for name in clip_tokenizer.FILES:
                if (folder / name).is_file():
                    paths.replace(partial / name, (folder / name).read_bytes())
        pretrained.write(converted, partial)
    return converted


def _replaced(kind: str, path, output: pathlib.Path) -> tuple[str, ...]:
    """The names of the files that a conversion writes, and of an earlier one's in `output`, with the mark last.

    Raises:
      UserError: `output` holds such a file that no conversion wrote, or it is the input.
    """
    mark, written = output / COMMON[-1], (*FILES[kind], *COMMON)
    found = str(json_files.read(mark).get("kind")) if mark.is_file() else None
    earlier = (*FILES[found], *COMMON) if found in FILES else ()
    if foreign := [name for name in reversed(written) if os.path.lexists(output / name) and name not in earlier]:
        raise UserError(f"output: {output} holds a {foreign[0]} that rahf.convert did not write; choose another folder")
    if os.path.realpath(path) in {os.path.realpath(output / name) for name in ("", *written)}:
        raise UserError(f"output: {output} holds the input {path}; choose another folder")
    return tuple(name for name in dict.fromkeys((*earlier, *written)) if name != mark.name) + (mark.name,)


def main():
    """The command."""
    args = flags.FLAGS
    converted = convert(args.source, args.input, args.output, args.vocabulary, args.timeout)
    parameters = sum(int(np.prod(tensor.shape)) for tensor in converted.tensors.values())
    found = f": {converted.found}" if converted.found else ""
    config = json.dumps(converted.config, indent=2)
    print(f"{args.output}: {converted.kind}, {parameters:,} parameters{found}\n{config}")


if __name__ == "__main__":
    flags.DEFINE_enum("source", None, list(READERS), "The format of the input.")
    flags.DEFINE_string("input", None, "A file, a folder, or a gs:// address of a T5X checkpoint.")
    flags.DEFINE_string("output", None, "The folder to write.")
    flags.DEFINE_string("vocabulary", None, "rahf-pytorch: T5's SentencePiece model, or a tokenizer folder that has it.")
    ranges.flag("timeout", weights.TIMEOUT, "t5x: seconds that an address may take to answer.", ranges.Range(1, 1e6))
    flags.mark_flags_as_required(["source", "input", "output"])
    command.run(main)

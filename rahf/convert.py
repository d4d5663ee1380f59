"""Converts weights in the formats of other projects to a folder that RAHF reads.

    python -m rahf.convert --source=vit-npz --input=ViT-B_16.npz --output=DIR
    python -m rahf.convert --source=t5x     --input=gs://t5-data/.../checkpoint_1000000 --output=DIR

writes DIR/weights.safetensors, with our parameter names, DIR/config.json, the model's configuration, and DIR/SHA256SUMS.
Training starts from such folders (pretrained.py) with `--config.init.vit=DIR` and `--config.init.t5=DIR`. A RAHF's folder
also holds its vocabulary, predict.stablehlo and, with --onnx, predict.onnx (export.py); a run's also README.md, a model card
(card.py); a CLIP's and an ImageReward's the files of its tokenizer.

    python -m rahf.convert --source=workdir --input=DIR --output=hf://owner/name --license=apache-2.0

sends the folder to an address (folders.py), from which rahf.load fetches it.

Names and shapes are checked before anything is written. One tensor is in memory at a time. The files are written beside an
earlier conversion's, in DIR/.partial, and take their places when all are complete.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from rahf import card, export, folders, predictor, pretrained, weights, workdirs
from rahf.models import critics
from rahf.pretrained import Pretrained
from rahf.readers import READERS
from rahf.reward import bert_tokenizer
from richhf_data import clip_tokenizer, command, json_files, paths, ranges
from richhf_data import vocabulary as vocabularies
from richhf_data.errors import UserError

TOKENIZERS = {"clip": clip_tokenizer.FILES, "image_reward": bert_tokenizer.FILES}  # kind -> files
FILES = dict.fromkeys(pretrained.SECTIONS, ()) | TOKENIZERS  # besides `COMMON`
FILES |= {"rahf": ("vocabulary.model", *vocabularies.CLIP_FILES, "predict.stablehlo", "predict.onnx")}
COMMON = ("weights.safetensors", folders.SUMS, "config.json")  # the last one marks a complete folder


def convert(
    source: str,
    path,
    output,
    vocabulary=None,
    timeout: float = weights.TIMEOUT,
    clip=None,
    license: str | None = None,
    onnx: bool = False,
    dtype: str = "float32",
) -> Pretrained:
    """Reads weights and writes the folder `output`.

    Args:
      source: a key of `READERS`. path: the file or folder to read.
      output: a folder, or an address as folders.py says.
      vocabulary: T5's SentencePiece model, for `source="rahf-pytorch"`; for a CLIP or an ImageReward the folder of its
        tokenizer, by default the input's. Without its files, what reads texts refuses the output.
      timeout: seconds that an address may take to answer, for `source="t5x"`.
      clip: a folder of kind "clip", for `source="aesthetic"`.
      license: of the weights, for the model card of `source="workdir"`. onnx: write predict.onnx of a RAHF.
      dtype: of the weights that are written, a key of `weights.WRITTEN`. What reads them computes as before.

    Raises:
      UserError: an input that is not of the format `source`; a RAHF without a vocabulary, or with too large a one; a
        vocabulary without a tokenizer's files; an output folder with a file of these names that is not an earlier
        conversion's, or that is an input; another process writes there; an address that cannot be written.
    """
    card.check_license(license)
    if onnx:
        export.check_onnx()
        if dtype != "float32":
            raise UserError(f"dtype: got {dtype}, expected float32 with --onnx: predict.onnx reads weights.safetensors")
    options = {"t5x": {"timeout": timeout}, "aesthetic": {"clip": clip}}.get(source, {})
    names = [name for files in (*FILES.values(), COMMON) for name in files]
    with folders.writing(output, names) as folder:
        converted = READERS[source](path, **options)
        paths.finish_exchange(folder)
        replaced = _replaced(converted.kind, [path, *([clip] if clip else [])], folder)
        tokenizer = _tokenizer(converted.kind, path, vocabulary)
        if onnx and converted.kind != "rahf":
            raise UserError(f"onnx: got a {converted.kind}, expected a whole RAHF")
        if converted.kind == "rahf":
            if source in ("workdir", "t5x-rahf"):
                vocabulary = workdirs.vocabulary(path if source == "workdir" else epath.Path(path).parent)
            elif not vocabulary:
                raise UserError(
                    f"vocabulary: got none, {path} needs the SentencePiece model of its T5; pass --vocabulary=PATH"
                )
            else:
                vocabulary = vocabularies.Vocabulary(vocabulary)
            model, length = critics.config_of(converted.config["model"]), converted.config["data"]["text_length"]
            predictor.check_vocabulary(model, vocabulary, length)
        with paths.exchanging(folder, replaced) as partial:
            if converted.kind == "rahf":
                vocabulary.copy(partial)
                export.export_stablehlo(converted, partial / "predict.stablehlo")
            for file in tokenizer:
                paths.replace(partial / file.name, file.read_bytes())
            pretrained.write(converted, partial, dtype)
            if onnx:
                export.export_onnx(converted, partial)
            folders.write_sums(partial)
            if source == "workdir" and folders.CARD in replaced:
                text = card.model_card(path, converted, os.fspath(output), license, os.listdir(partial), dtype)
                paths.replace(partial / folders.CARD, text.encode())
    if source == "workdir" and folders.CARD not in replaced:
        print(f"{folder}: the {folders.CARD} there is yours, and stays")
    return converted


def _tokenizer(kind: str, path, vocabulary) -> list[pathlib.Path]:
    """The files of its tokenizer that a conversion copies. Raises UserError for a vocabulary that has none of them."""
    path = pathlib.Path(vocabulary or path)
    folder = path if path.is_dir() else path.parent
    found = [folder / name for name in TOKENIZERS.get(kind, ()) if (folder / name).is_file()]
    if kind in TOKENIZERS and vocabulary and not found:
        raise UserError(f"vocabulary: {vocabulary} has none of {', '.join(TOKENIZERS[kind])}, expected a tokenizer's folder")
    return found


def _replaced(kind: str, inputs: Sequence, output: pathlib.Path) -> tuple[str, ...]:
    """The names of the files that a conversion writes, and of an earlier one's in `output`, with the mark last.

    A model card that is the user's is not among them.

    Raises:
      UserError: `output` holds such a file that no conversion wrote, or it is the input.
    """
    mark, written = output / COMMON[-1], (*FILES[kind], *COMMON)
    found = str(json_files.read(mark).get("kind")) if mark.is_file() else None
    earlier = (*FILES[found], *COMMON) if found in FILES else ()
    if foreign := [name for name in reversed(written) if os.path.lexists(output / name) and name not in earlier]:
        raise UserError(f"output: {output} holds a {foreign[0]} that rahf.convert did not write; choose another folder")
    for path in inputs:
        if os.path.realpath(path) in {os.path.realpath(output / name) for name in ("", *written)}:
            raise UserError(f"output: {output} holds the input {path}; choose another folder")
    file = output / folders.CARD
    cards = () if os.path.lexists(file) and not folders.is_written_by_us(file) else (folders.CARD,)
    return cards + tuple(name for name in dict.fromkeys((*earlier, *written)) if name != mark.name) + (mark.name,)


def main():
    """The command."""
    args = flags.FLAGS
    options = {name: getattr(args, name) for name in ("vocabulary", "timeout", "clip", "license", "onnx", "dtype")}
    converted = convert(args.source, args.input, args.output, **options)
    parameters = sum(int(np.prod(tensor.shape)) for tensor in converted.tensors.values())
    found = f": {converted.found}" if converted.found else ""
    config = json.dumps(converted.config, indent=2)
    print(f"{args.output}: {converted.kind}, {parameters:,} parameters{found}\n{config}")


if __name__ == "__main__":
    flags.DEFINE_enum("source", None, list(READERS), "The format of the input.")
    flags.DEFINE_string("input", None, "A file, a folder, or a gs:// address of a T5X checkpoint.")
    flags.DEFINE_string("output", None, "The folder to write, or its address: hf://owner/name, gs://..., s3://...")
    flags.DEFINE_string(
        "vocabulary",
        None,
        "rahf-pytorch: T5's SentencePiece model, or a tokenizer folder that has it. clip-hf, open-clip, image-reward: the "
        "folder of the tokenizer, by default the input's.",
    )
    flags.DEFINE_string("clip", None, "aesthetic: the CLIP under the head, a folder that this command wrote.")
    flags.DEFINE_string("license", None, "workdir: the licence of the weights, for the model card, such as apache-2.0.")
    flags.DEFINE_bool("onnx", False, "workdir, rahf-pytorch: write predict.onnx too. Needs jax2onnx.")
    flags.DEFINE_enum(
        "dtype",
        "float32",
        list(weights.WRITTEN),
        "Of the weights that are written; bfloat16 halves the folder. The model computes as before.",
    )
    ranges.flag("timeout", weights.TIMEOUT, "t5x: seconds that an address may take to answer.", ranges.Range(1, 1e6))
    flags.mark_flags_as_required(["source", "input", "output"])
    command.run(main)

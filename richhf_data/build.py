"""Builds the dataset that training reads, from RichHF records and images.

  python -m richhf_data.build --records=DIR --images=parquet:'DIR/*.parquet' --data_dir=DIR

Running it again does nothing; a build that was interrupted starts again, and leaves nothing that looks finished.
"""

import json
import pathlib
import sys

from absl import app, flags

from richhf_data import builder, vocabulary
from richhf_data.tensorflow_cpu import tfds

_RECORDS = flags.DEFINE_string("records", None, "Folder of train.tfrecord, dev.tfrecord, ...", required=True)
_IMAGES = flags.DEFINE_string("images", None, "parquet:GLOB or folder:DIR, see richhf_data/images.py", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to write the dataset and vocabulary.model.", required=True)
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "A SentencePiece model to use; by default one is trained.")
_VOCABULARY_SIZE = flags.DEFINE_integer("vocabulary_size", 512, "Most pieces of a vocabulary that is trained.", 16)
_MAX_MISSING_SHARE = flags.DEFINE_float(
    "max_missing_share", 0.01, "Fail where more of a split's records have no usable image.", 0.0, 1.0
)


def build(
    records,
    images: str,
    data_dir,
    *,
    vocabulary_path=None,
    vocabulary_size: int = 512,
    max_missing_share: float = 0.01,
) -> dict:
    """Builds what is not there yet: the dataset and data_dir/vocabulary.model. Returns the dataset's report.

    Raises:
      ValueError: what records.py, images.py and builder.py refuse; or `data_dir` holds a dataset of other records or
        another vocabulary.
    """
    folder = builder.dataset_dir(data_dir)
    if folder.is_dir():
        report = json.loads((folder / "report.json").read_text())
        if report["records"] != builder.digests(builder.record_paths(records)):
            raise ValueError(
                f"data_dir: {folder} was built from other records than those of {records} now, expected the same; "
                "use another --data_dir, or delete that folder"
            )
        print(f"already built: {folder}")
    else:
        # TFDS writes to a temporary folder and renames it.
        for left in sorted(folder.parent.glob("incomplete.*")):
            print(f"left by an interrupted build, unless one is running: {left}; delete it to free its space")
        dataset = builder.Richhf(data_dir=data_dir, records=records, images=images, max_missing_share=max_missing_share)
        dataset.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        report = json.loads((folder / "report.json").read_text())
    _provide_vocabulary(pathlib.Path(data_dir) / "vocabulary.model", vocabulary_path, vocabulary_size, folder)
    return report


def _provide_vocabulary(path: pathlib.Path, given, size: int, folder: pathlib.Path) -> None:
    """Copies the given model, or trains one on the training prompts, unless it is there."""
    if given is not None:
        vocabulary.Vocabulary(given)  # refuses what is not a usable model
        content = pathlib.Path(given).read_bytes()
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(content)
            partial.replace(path)
        elif path.read_bytes() != content:
            raise ValueError(
                f"vocabulary: {path} is there and differs from {given}, expected the same, because models are trained "
                "with it; delete it or use another --data_dir"
            )
    elif not path.exists():
        prompts = json.loads((folder / "prompts.json").read_text())
        if "train" not in prompts:
            raise ValueError("vocabulary: got no train split to train one on; give --vocabulary=PATH")
        vocabulary.train((prompt for _, prompt, _ in prompts["train"]), path, size)
    print(f"vocabulary: {path} ({vocabulary.Vocabulary(path).size} pieces)")


def main(argv) -> None:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    try:
        report = build(
            _RECORDS.value,
            _IMAGES.value,
            _DATA_DIR.value,
            vocabulary_path=_VOCABULARY.value,
            vocabulary_size=_VOCABULARY_SIZE.value,
            max_missing_share=_MAX_MISSING_SHARE.value,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(builder.report_table(report))


if __name__ == "__main__":
    app.run(main)

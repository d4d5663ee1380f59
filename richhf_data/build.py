"""Builds the dataset that training reads, from RichHF records and images, or from a table that holds both.

  python -m richhf_data.build --records=DIR --images=parquet:'DIR/*.parquet' --data_dir=DIR
  python -m richhf_data.build --records=rapidata:'DIR/*.parquet' --data_dir=DIR
  python -m richhf_data.build --records=captions:'DIR/*.parquet' --data_dir=DIR      # or captions:tfds:NAME

Running it again does nothing. An interrupted build leaves nothing that looks finished. The next run starts over, but from
records it does not read again the images that it has read.
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

from absl import flags

from richhf_data import command, keywords, parquet, paths, ranges, scan, schema, tables, vocabulary
from richhf_data.errors import UserError
from richhf_data.images import MAX_PIXELS
from richhf_data.workers import start_worker

_RECORDS = flags.DEFINE_string(
    "records",
    None,
    "train.tfrecord, dev.tfrecord, ...: their folder, a file or a pattern; or rapidata:GLOB, captions:GLOB or "
    "captions:tfds:NAME, see tables.py",
    required=True,
)
_IMAGES = flags.DEFINE_string("images", "", "For records: parquet:GLOB, table:GLOB or folder:DIR, see image_sources.py.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to write the dataset and vocabulary.model.", required=True)
_COLUMNS = flags.DEFINE_list(
    "columns",
    [],
    "uid=NAME,prompt=NAME,image=NAME: columns of a table or of a folder's captions, in place of a guess. A table of "
    "--records has no uid, and a caption is its prompt. A TFDS feature is named by its path, such as captions/text.",
)
_MAX_PIXELS = ranges.flag("max_pixels", MAX_PIXELS, "Scale larger images down to this.", ranges.COUNT)
_WORKERS = ranges.flag(
    "workers", os.cpu_count(), "Processes that read the images; 0 = this process.", ranges.NUMBER_OF_PROCESSES
)
_BEAM = flags.DEFINE_string("beam", None, "Read the images in an Apache Beam pipeline of these options (--runner=...).")
_PARTS = flags.DEFINE_string("parts", None, "Keeps the images found until the dataset is built; DATA_DIR/parts by default.")
_KEEP_PARTS = flags.DEFINE_bool("keep_parts", False, "Keep the parts after the dataset is built.")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "A SentencePiece model; by default one is trained.")
_VOCABULARY_SIZE = ranges.flag(
    "vocabulary_size", 512, "The most pieces of a trained vocabulary.", ranges.Range(16, 2**20, whole=True)
)
_MAX_MISSING_SHARE = ranges.flag(
    "max_missing_share", 0.01, "Fail if a larger share of a split's records has no usable image.", ranges.SHARE
)
ranges.flag("holdout", schema.HOLDOUT, "Of a table: the share of dev, and of test.", ranges.HOLDOUT)
flags.DEFINE_string("caption_prompt", schema.CAPTION_PROMPT, "The prompt of every caption.")
flags.DEFINE_string("tfds_data_dir", None, "Where TFDS keeps the dataset of captions:tfds:NAME.")
ranges.flag(
    "word_threshold",
    tables.WORD_THRESHOLD,
    "A word of Rapidata's is misaligned above this share of the weight.",
    ranges.SHARE,
)
_ALLOW_ABSENT = flags.DEFINE_bool("allow_absent", False, "Accept records without some targets, as consolidate writes.")
_OF_RECORD_FILES = ("workers", "beam", "parts", "keep_parts", "allow_absent")  # flags that no table uses


def build(
    records,
    images: str,
    data_dir,
    *,
    vocabulary_path=None,
    vocabulary_size: int = 512,
    max_missing_share: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    allow_absent: bool = False,
    columns: dict[str, str] | None = None,
    workers: int = 0,
    beam: str | None = None,
    parts: str | None = None,
    keep_parts: bool = False,
    **table_options,
) -> dict:
    """Builds the dataset and data_dir/vocabulary.model, unless they exist. Returns the report of the dataset.

    The arguments are the flags of the command; `columns`, `max_pixels`, `workers` and `beam` as in `scan.gather`;
    `table_options` are those of the table's format (`tables.FORMATS`).

    Raises:
      UserError: what records.py, image_sources.py, scan.py, tables.py and builder.py refuse; --images is missing, or given
        with a table; or `data_dir` holds a dataset of other records or another vocabulary.
    """
    if table := tables.find_format(records):
        if images:
            raise UserError(f"images: got {images!r}, expected none: {records} holds its images; leave it out")
        table_format, where = table
        source = table_format.open(where, max_pixels=max_pixels, columns=columns, **table_options)
        begin = not _is_built(records, data_dir, source.identity())
    else:
        if not images:
            raise UserError("images: got none, expected parquet:GLOB, table:GLOB or folder:DIR beside record files")
        wanted = _apart(_wanted, records, data_dir, allow_absent) if workers else _wanted(records, data_dir, allow_absent)
        if begin := bool(wanted):
            found, part_files = scan.gather(
                images,
                wanted,
                parts or f"{data_dir}/parts",
                columns=columns,
                max_pixels=max_pixels,
                workers=workers,
                beam=beam,
            )
    from richhf_data import builder
    from richhf_data.tensorflow_cpu import tfds

    if begin:
        if not table:
            source = builder.RecordFiles(records, found, allow_absent)
        dataset = builder.Richhf(data_dir=data_dir, source=source, max_missing_share=max_missing_share)
        # Without this folder TFDS leaves an empty one of downloads in data_dir.
        with tempfile.TemporaryDirectory() as nothing, paths.naming(data_dir):
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            try:
                dataset.download_and_prepare(download_dir=nothing, download_config=config)
            except BaseException:
                print(file=sys.stderr)  # its progress bars leave their line open
                raise
        if not table and not keep_parts:
            scan.remove(part_files)
    folder = builder.dataset_dir(data_dir)
    report = builder.read_report(folder)
    _provide_vocabulary(pathlib.Path(data_dir) / "vocabulary.model", vocabulary_path, vocabulary_size, folder)
    return report


def _apart(function, *arguments):
    """Calls a function in a process of its own, which gives back the memory of TensorFlow (up to a GiB) when it ends."""
    context = multiprocessing.get_context("spawn")
    with paths.naming("/dev/shm"):  # its semaphores
        made = concurrent.futures.ProcessPoolExecutor(1, context, initializer=start_worker)
    with made as pool:
        try:
            return pool.submit(function, *arguments).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "records: the process that reads them died, most likely for want of memory; free some and run the command "
                "again, or use --workers=0"
            ) from error


def _wanted(records, data_dir, allow_absent: bool) -> set[str]:
    """The uids of all records; none if their dataset is built."""
    from richhf_data import builder

    paths = builder.record_paths(records)
    if _is_built(records, data_dir, builder.digests(paths)):
        return set()
    return {uid for position in builder.positions(paths, allow_absent).values() for uid in position}


def _is_built(records, data_dir, identity) -> bool:
    """Whether the dataset exists. Raises UserError if it was built from other examples."""
    from richhf_data import builder

    folder = builder.dataset_dir(data_dir)
    if not folder.is_dir():
        # TFDS writes to a temporary folder and renames it.
        found = folder.parent.iterdir() if folder.parent.is_dir() else ()
        for left in sorted(path for path in found if path.name.startswith("incomplete.")):
            print(f"left by an interrupted build, unless one is running: {left}; delete it to free its space")
        return False
    if builder.read_report(folder)["records"] != json.loads(json.dumps(identity)):
        raise UserError(
            f"data_dir: {folder} was built from other records than those of {records} now, expected the same; "
            "use another --data_dir, or delete that folder"
        )
    print(f"already built: {folder}")
    return True


def _provide_vocabulary(path: pathlib.Path, given, size: int, folder: pathlib.Path) -> None:
    """Copies the given model or trains one on the training prompts, unless the file exists."""
    from richhf_data import builder

    prompts = builder.read_prompts(folder)
    if given is not None:
        vocabulary.Vocabulary(given)  # refuses what is not a usable model
        content = pathlib.Path(given).read_bytes()
        if not path.exists():
            paths.replace(path, content)
        elif path.read_bytes() != content:
            raise UserError(
                f"vocabulary: {path} is there and differs from {given}, expected the same, because models are trained "
                "with it; delete it or use another --data_dir"
            )
    elif not path.exists():
        if "train" not in prompts:
            raise UserError("vocabulary: got no train split to train one on; give --vocabulary=PATH")
        vocabulary.train(_vocabulary_texts(prompts["train"]), path, size)
    pieces = vocabulary.Vocabulary(path)
    rows = itertools.chain.from_iterable(prompts.values())
    unknown = sum(not pieces.knows(f"{prompt} {labelled}") for _, prompt, labelled in rows)
    lost = f"; {unknown} examples have characters that it does not know" if unknown else ""
    print(f"vocabulary: {path} ({pieces.size} pieces){lost}")


def _vocabulary_texts(rows: list[list[str]]) -> Iterator[str]:
    """The training prompts. Of captions: the captions, and their common prompt once."""
    constant = set()
    for _, prompt, labelled in rows:
        written = [word for word, _ in keywords.read_words(labelled)]
        if labelled and written != [word for token in keywords.tokenize(prompt) for word in keywords.written_words(token)]:
            constant.add(prompt)
            yield labelled
        else:
            yield prompt
    yield from sorted(constant)


def _refuse_unused(records: str) -> None:
    """Raises UserError if a flag was given that this kind of records does not use."""
    users = {name: ["record files"] for name in _OF_RECORD_FILES}
    for table_format in tables.FORMATS.values():
        for name in table_format.options:
            users.setdefault(name, []).append(table_format.spec)
    found = tables.find_format(records)
    kind = found[0].spec if found else "record files"
    for name, specs in users.items():
        if flags.FLAGS[name].present and kind not in specs:
            expected = " and ".join(specs)
            raise UserError(f"{name}: got it with --records={records}, expected it with {expected} alone; leave it out")


def main() -> None:
    """The command."""
    _refuse_unused(_RECORDS.value)
    table = tables.find_format(_RECORDS.value)
    with paths.locked(_DATA_DIR.value):
        report = build(
            _RECORDS.value,
            _IMAGES.value,
            _DATA_DIR.value,
            vocabulary_path=_VOCABULARY.value,
            vocabulary_size=_VOCABULARY_SIZE.value,
            max_missing_share=_MAX_MISSING_SHARE.value,
            max_pixels=_MAX_PIXELS.value,
            allow_absent=_ALLOW_ABSENT.value,
            columns=parquet.columns_of(_COLUMNS.value),
            workers=_WORKERS.value,
            beam=_BEAM.value,
            parts=_PARTS.value,
            keep_parts=_KEEP_PARTS.value,
            **({name: flags.FLAGS[name].value for name in table[0].options} if table else {}),
        )
    from richhf_data import builder

    print(builder.report_table(report))


if __name__ == "__main__":
    command.run(main)

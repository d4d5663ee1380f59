"""Builds the dataset that training reads, from RichHF records and images, or from a table that holds both.

  python -m richhf_data.build --records=DIR --images=parquet:'DIR/*.parquet' --data_dir=DIR
  python -m richhf_data.build --records=rapidata:'DIR/*.parquet' --data_dir=DIR
  python -m richhf_data.build --records=captions:'DIR/*.parquet' --data_dir=DIR      # or captions:tfds:NAME

Running it again does nothing. A build that was interrupted leaves nothing that looks finished; from records it goes on
without reading again what it has read of the images, from a table it begins anew.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

from absl import flags

from richhf_data import command, keywords, paths, scan, schema, tables, vocabulary
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
    "uid=NAME,prompt=NAME,image=NAME: columns of a table or of a folder's captions, otherwise guessed; a table of --records "
    "has no uid, its captions are prompts, and TFDS features are called by their parts joined by /, captions/text.",
)
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", MAX_PIXELS, "Scale larger images down to this.", 1)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes that read the images, 0 = this one alone.", 0)
_BEAM = flags.DEFINE_string("beam", None, "Read the images in an Apache Beam pipeline of these options (--runner=...).")
_PARTS = flags.DEFINE_string("parts", None, "Where the images found wait for the build; DATA_DIR/parts by default.")
_KEEP_PARTS = flags.DEFINE_bool("keep_parts", False, "Leave them there when the dataset is built.")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "A SentencePiece model to use; by default one is trained.")
_VOCABULARY_SIZE = flags.DEFINE_integer("vocabulary_size", 512, "Most pieces of a vocabulary that is trained.", 16)
_MAX_MISSING_SHARE = flags.DEFINE_float(
    "max_missing_share", 0.01, "Fail where more of a split's records have no usable image.", 0.0, 1.0
)
_HOLDOUT = flags.DEFINE_float("holdout", schema.HOLDOUT, "Of a table: the share of dev, and of test.", 0.0, 0.45)
_CAPTION_PROMPT = flags.DEFINE_string("caption_prompt", "image caption", "What stands for the prompt of captions.")
_TFDS_DATA_DIR = flags.DEFINE_string("tfds_data_dir", None, "Where TFDS keeps the dataset of captions:tfds:NAME.")
_WORD_THRESHOLD = flags.DEFINE_float(
    "word_threshold", tables.WORD_THRESHOLD, "Rapidata's word is misaligned above this share of the weight.", 0.0, 1.0
)
_ALLOW_ABSENT = flags.DEFINE_bool("allow_absent", False, "Take records that lack targets, such as consolidate writes.")
_TABLES = ("rapidata", "captions", "captions:tfds")
_USED_BY = {  # flag: the sources of records that do; the other flags are for all of them
    **dict.fromkeys(("workers", "beam", "parts", "keep_parts", "allow_absent"), ("files",)),
    "holdout": _TABLES,
    "caption_prompt": _TABLES[1:],
    "tfds_data_dir": _TABLES[2:],
    "word_threshold": _TABLES[:1],
}


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
    """Builds what is not there yet: the dataset and data_dir/vocabulary.model. Returns the dataset's report.

    Args are the command's flags; `columns`, `max_pixels`, `workers` and `beam` as in `scan.gather`; `table_options` as in
    `open_table`.

    Raises:
      UserError: what records.py, image_sources.py, scan.py, tables.py and builder.py refuse; --images is missing, or superfluous;
        or `data_dir` holds a dataset of other records or another vocabulary.
    """
    if table := is_table(records):
        if images:
            raise UserError(f"images: got {images!r}, expected none: {records} holds its images; leave it out")
        source = open_table(records, max_pixels=max_pixels, columns=columns, **table_options)
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
        with tempfile.TemporaryDirectory() as nothing:  # or TFDS leaves an empty folder of downloads in data_dir
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            try:
                dataset.download_and_prepare(download_dir=nothing, download_config=config)
            except BaseException:
                print(file=sys.stderr)  # its progress bars leave their line open
                raise
        if not table and not keep_parts:
            scan.remove(part_files)
    folder = builder.dataset_dir(data_dir)
    report = json.loads((folder / "report.json").read_text())
    _provide_vocabulary(pathlib.Path(data_dir) / "vocabulary.model", vocabulary_path, vocabulary_size, folder)
    return report


def is_table(records) -> bool:
    """Whether --records names a table that holds its images, rather than record files."""
    return str(records).partition(":")[0] in ("rapidata", "captions")


def open_table(
    records: str,
    *,
    max_pixels: int = MAX_PIXELS,
    holdout: float = schema.HOLDOUT,
    columns: dict[str, str] | None = None,
    caption_prompt: str = "image caption",
    tfds_data_dir: str | None = None,
    word_threshold: float = tables.WORD_THRESHOLD,
):
    """The source (builder.py) of a table; the arguments are the flags.

    Raises:
      UserError: what tables.py refuses.
    """
    kind, _, where = str(records).partition(":")
    if kind == "rapidata":
        return tables.Rapidata(where, columns, holdout, word_threshold, max_pixels)
    return tables.Captions(where, caption_prompt, columns, holdout, tfds_data_dir, max_pixels)


def _apart(function, *arguments):
    """Its value, from a process that ends: TensorFlow takes the better part of a GiB, which the workers shall have."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=start_worker) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "records: the process that reads them died, most likely for want of memory; free some and run the command "
                "again, or use --workers=0"
            ) from error


def _wanted(records, data_dir, allow_absent: bool) -> set[str]:
    """The uids of all records; none where their dataset is built."""
    from richhf_data import builder

    paths = builder.record_paths(records)
    if _is_built(records, data_dir, builder.digests(paths)):
        return set()
    return {uid for position in builder.positions(paths, allow_absent).values() for uid in position}


def _is_built(records, data_dir, identity) -> bool:
    """Whether the dataset is there. Raises UserError where it is another one."""
    from richhf_data import builder

    folder = builder.dataset_dir(data_dir)
    if not folder.is_dir():
        # TFDS writes to a temporary folder and renames it.
        for left in sorted(folder.parent.glob("incomplete.*")):
            print(f"left by an interrupted build, unless one is running: {left}; delete it to free its space")
        return False
    if json.loads((folder / "report.json").read_text())["records"] != json.loads(json.dumps(identity)):
        raise UserError(
            f"data_dir: {folder} was built from other records than those of {records} now, expected the same; "
            "use another --data_dir, or delete that folder"
        )
    print(f"already built: {folder}")
    return True


def _provide_vocabulary(path: pathlib.Path, given, size: int, folder: pathlib.Path) -> None:
    """Copies the given model, or trains one on the training prompts, unless it is there."""
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
        prompts = json.loads((folder / "prompts.json").read_text())
        if "train" not in prompts:
            raise UserError("vocabulary: got no train split to train one on; give --vocabulary=PATH")
        vocabulary.train(_vocabulary_texts(prompts["train"]), path, size)
    print(f"vocabulary: {path} ({vocabulary.Vocabulary(path).size} pieces)")


def _vocabulary_texts(rows: list[list[str]]) -> Iterator[str]:
    """The training prompts; of captions, the captions, and what stands for a prompt once."""
    constant = set()
    for _, prompt, labelled in rows:
        written = [word.removesuffix(keywords.SUFFIX) for word in labelled.split()]
        if labelled and written != keywords.tokenize(prompt):
            constant.add(prompt)
            yield labelled
        else:
            yield prompt
    yield from sorted(constant)


def _refuse_unused(records: str) -> None:
    """Raises UserError where a flag was given that the source of the records does not use."""
    source = next((kind for kind in ("rapidata", "captions:tfds", "captions") if records.startswith(kind + ":")), "files")
    for name, sources in _USED_BY.items():
        if flags.FLAGS[name].present and source not in sources:
            kinds = {"files": "record files", "rapidata": "rapidata:GLOB", "captions": "captions:GLOB"}
            expected = " and ".join(kinds.get(kind, f"{kind}:NAME") for kind in sources)
            raise UserError(f"{name}: got it with --records={records}, expected it with {expected} alone; leave it out")


def _columns(items: list[str]) -> dict[str, str]:
    if bad := [item for item in items if not all(item.partition("="))]:
        raise UserError(f"columns: got {bad[0]!r}, expected uid=NAME, prompt=NAME or image=NAME, separated by commas")
    return dict(item.split("=", 1) for item in items)


def main() -> None:
    """The command."""
    _refuse_unused(_RECORDS.value)
    report = build(
        _RECORDS.value,
        _IMAGES.value,
        _DATA_DIR.value,
        vocabulary_path=_VOCABULARY.value,
        vocabulary_size=_VOCABULARY_SIZE.value,
        max_missing_share=_MAX_MISSING_SHARE.value,
        max_pixels=_MAX_PIXELS.value,
        allow_absent=_ALLOW_ABSENT.value,
        columns=_columns(_COLUMNS.value),
        workers=_WORKERS.value,
        beam=_BEAM.value,
        parts=_PARTS.value,
        keep_parts=_KEEP_PARTS.value,
        holdout=_HOLDOUT.value,
        caption_prompt=_CAPTION_PROMPT.value,
        tfds_data_dir=_TFDS_DATA_DIR.value,
        word_threshold=_WORD_THRESHOLD.value,
    )
    from richhf_data import builder

    print(builder.report_table(report))


if __name__ == "__main__":
    command.run(main)

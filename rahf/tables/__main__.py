"""The papers' tables for any set of models, with 95 % intervals, and the rows that may be as good as the best.

    python -m rahf.tables --data_dir=DIR --split=test --rows RAHF=run CLIP=clip:DIR --output=tables

writes into the folder of --output

  tables.md, tables.tex, tables.json   the paper's four tables, and the errors of the scores
  report.html                          the same with plots and pictures
  rows/test-955/NAME/predictions.parquet
                                       the predictions, kept: the same command makes the tables again in seconds
  targets.parquet, references.json     the annotators' answers, and rows to compare with that came with the dataset

`python -m pydoc rahf.tables.rows` lists what a row may be. Without --data_dir the tables are made of what is kept, which
needs no TensorFlow; the page then has no pictures.
"""

import dataclasses
import pathlib

from absl import flags

from rahf.tables import bootstrap, dataset, layout, measure, page, published, rows, targets
from richhf_data import command, json_files, paths, ranges
from richhf_data.errors import UserError

DEFAULT_SIZE = 224  # of compared maps where no row predicts any
FLAG = "--rows"


def read_rows(argv: list[str]) -> list[str]:
    """The arguments with --rows=ROW for each that follows --rows up to the next flag."""
    found, in_rows = argv[:1], False
    for argument in argv[1:]:
        if argument.startswith("-"):
            in_rows = argument == FLAG or argument.startswith(f"{FLAG}=")
            if argument != FLAG:
                found.append(argument)
        else:
            found.append(f"{FLAG}={argument}" if in_rows else argument)
    return found


@dataclasses.dataclass(frozen=True)
class Options:
    """What the tables are of; see the flags of the command."""

    output: str
    data_dir: str | None = None
    split: str = "test"
    num_examples: int | None = None
    heatmap_size: int | None = None
    resamples: int = bootstrap.RESAMPLES
    seed: int = 0
    batch_size: int = 32
    categories: str | None = None


def make(specs: list[str], options: Options) -> str:
    """Predicts what is not kept, measures, and writes the files; returns the tables as Markdown.

    Args:
      specs: NAME=SPEC of each row.

    Raises:
      UserError: see rows.py and predictions.py.
    """
    wanted, output = rows.parse_all(specs), pathlib.Path(options.output)
    with paths.locked(output):
        source = None
        if options.data_dir is not None:
            source = dataset.Dataset(options.data_dir, options.split, options.num_examples)
        of = source.of if source else _kept_header(output, options).of
        folder = rows.folder_of(output, of)
        found, identities, rewards = rows.keep(wanted, source, of, folder, options.batch_size)
        if source is not None:
            largest = max(one.size for one in found.values())
            source.write_targets(output, options.heatmap_size or largest or DEFAULT_SIZE)
        truth = targets.Targets(output / "targets.parquet")
        caches = {row.title: folder / row.folder / "metrics.npz" for row in wanted}
        values = {title: measure.measure(one, truth, caches[title]) for title, one in found.items()}
        estimates = bootstrap.estimates(values, rewards, options.resamples, options.seed)
        references = dataset.read_references(output)
        is_published = published.is_test_of_richhf_18k(truth.header.split, truth.scores)
        others = published.rows() if is_published else {}
        found_tables = layout.tables(estimates, references, others)
        title = _title(truth.header)
        notes = [*_notes(truth.header, options, rewards, is_published), *rows.notes(wanted, folder)]
        text = layout.markdown(title, notes, found_tables)
        result = {
            **dataclasses.asdict(truth.header),
            "resamples": options.resamples,
            "seed": options.seed,
            "specs": {row.title: f"{row.calibration}:{row.spec}" if row.calibration else row.spec for row in wanted},
            "identities": identities,
            "rows": layout.as_json(estimates),
            "references": references,
            "published": others,
        }
        paths.replace(output / "tables.md", text.encode())
        paths.replace(output / "tables.tex", layout.latex(title, notes, found_tables).encode())
        json_files.write(output / "tables.json", result)
        sections = page.sections(found, values, truth, rewards, source, options.categories)
        paths.replace(output / "report.html", page.render(title, notes, found_tables, sections).encode())
    return text


def _kept_header(output: pathlib.Path, options: Options) -> targets.Header:
    """What the kept targets are of. Raises UserError if there are none, or if the flags ask for other examples."""
    file = output / "targets.parquet"
    if not file.is_file():
        raise UserError(f"data_dir: got none, and there is no {file}, expected --data_dir=DIR")
    header = targets.Targets(file).header
    if header.split != options.split:
        raise UserError(f"split: got {options.split}, but {options.output} holds {header.split}; pass --data_dir")
    if options.heatmap_size and options.heatmap_size != header.heatmap_size:
        has = f"{options.output} holds maps of {header.heatmap_size} pixels"
        raise UserError(f"heatmap_size: got {options.heatmap_size}, but {has}; pass --data_dir")
    if options.num_examples and options.num_examples != header.num_examples:
        has = f"{options.output} holds {header.num_examples} examples"
        raise UserError(f"num_examples: got {options.num_examples}, but {has}; pass --data_dir")
    return header


def _title(header: targets.Header) -> str:
    return f"{header.split}: {header.num_examples:,} examples"


def _notes(header, options, rewards, is_published) -> list[str]:
    notes = [
        layout.MARKS,
        f"{options.resamples:,} resamples, seed {options.seed}. Heatmaps are compared at {header.heatmap_size} pixels.",
    ]
    if options.num_examples:
        notes.append("Reference rows that came with the dataset are of the whole split.")
    if rewards:
        notes.append(f"One number for the picture, compared with each score: {', '.join(sorted(rewards))}.")
    if is_published:
        notes.append("Published rows have no intervals, and no marks.")
    return notes


def main() -> None:
    """The command."""
    args = flags.FLAGS
    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    print(f"{make(args.rows, options)}\nwritten to {pathlib.Path(args.output) / 'report.html'}")


if __name__ == "__main__":
    plain = Options(output="tables")
    flags.DEFINE_multi_string("rows", [], "NAME=SPEC of each row: --rows A=run 'B=clip:DIR'; see rahf.tables.rows.")
    flags.DEFINE_string("data_dir", None, "A built dataset; without it the tables are made of what --output holds.")
    flags.DEFINE_string("split", plain.split, "The split of --data_dir.")
    flags.DEFINE_string("output", plain.output, "The folder to write to.")
    ranges.flag("num_examples", None, "The first so many only; all by default.", ranges.COUNT)
    ranges.flag(
        "heatmap_size", None, "Pixels of a side of the compared maps; the largest of the rows' if absent.", ranges.PIXELS
    )
    ranges.flag("resamples", plain.resamples, "Resamples of the bootstrap.", ranges.Range(100, 10**6, whole=True))
    ranges.flag("seed", plain.seed, "Draws the resamples.", ranges.SEED)
    ranges.flag("batch_size", plain.batch_size, "Images at a time.", ranges.ROWS)
    flags.DEFINE_string("categories", None, "A .jsonl table with category and uid or image of each picture, for the page.")
    command.run(main, read_rows)

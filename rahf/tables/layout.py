"""The paper's four tables, one of the scores' errors, and one of captions if there are any, as Markdown, LaTeX and JSON."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from tabulate import tabulate

from rahf.tables.bootstrap import LOWER_IS_BETTER, SCORE_METRICS, Estimate
from richhf_data import command
from richhf_data.metrics import KEYWORD_METRICS
from richhf_data.schema import HEATMAPS, SCORES

_SCORES = ("plausibility", "aesthetics", "alignment", "overall", "mean")  # in the paper's order
assert set(SCORES) < set(_SCORES)
_HEATMAP_HEADERS = {
    "mse": "MSE all",
    "mse_empty": "MSE empty",
    "cc": "CC",
    "kld": "KLD",
    "sim": "SIM",
    "nss": "NSS",
    "auc_judd": "AUC-Judd",
}
MARKS = (
    "Bold: the best of our rows. Dagger: may be as good, as no row is significantly better (multiple comparisons with the "
    "best, paired, one-sided 97.5 %). Brackets: the 95 % interval of a bootstrap over examples."
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: the key of a metric, and how its values are printed."""

    key: str
    group: str
    header: str
    form: str
    scale: float = 1.0

    @property
    def arrow(self) -> str:
        """Which values are better."""
        return "↓" if self.key.split("/")[1] in LOWER_IS_BETTER else "↑"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A printed value: "0.693", "undefined", or "-" for none; and its interval, "[0.651, 0.731]" or ""."""

    text: str
    interval: str = ""
    best: bool = False
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a table. section: 0 = ours, 1 = references, 2 = published."""

    name: str
    section: int
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table. A row that has none of its values is left out."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(name, number of columns) of each group of columns."""
        names = list(dict.fromkeys(column.group for column in self.columns))
        return [(name, sum(column.group == name for column in self.columns)) for name in names]


def _columns() -> dict[str, list[Column]]:
    correlations = [Column(f"score/{key}/{name}", name, key.upper(), ".3f") for name in _SCORES for key in SCORE_METRICS[:2]]
    errors = [Column(f"score/{key}/{name}", name, key.upper(), ".3f") for name in _SCORES for key in SCORE_METRICS[2:]]
    found = {"Scores": correlations, "Scores: errors, of values in [0, 1]": errors}
    for heatmap in HEATMAPS:
        found[f"{heatmap.capitalize()} heatmap"] = [
            Column(f"heatmap/{key}/{heatmap}", "", header, ".5f" if key.startswith("mse") else ".3f")
            for key, header in _HEATMAP_HEADERS.items()
        ]
    found["Misaligned words, %"] = [
        Column(f"keywords/{kind}/{key}", kind.replace("_", " "), key.replace("f1", "F1"), ".1f", 100)
        for kind in ("micro", "per_prompt")
        for key in KEYWORD_METRICS
    ]
    found["Captions, %"] = [Column("caption/word_f1", "", "word F1", ".1f", 100)]
    return found


def tables(
    rows: Mapping[str, Mapping[str, Estimate]],
    references: Mapping[str, Mapping[str, float | None]],
    published: Mapping[str, Mapping[str, float]],
) -> list[Table]:
    """The tables that have any row of ours.

    Args:
      rows: what `bootstrap.estimates` returned. references, published: {name: {metric: value}}; None is undefined.
    """
    found = []
    for title, columns in _columns().items():
        lines = []
        for section, some in enumerate((rows, references, published)):
            for name, values in some.items():
                if any(column.key in values for column in columns):
                    lines.append(Line(name, section, tuple(_cell(column, values) for column in columns)))
        if any(line.section == 0 for line in lines):
            found.append(Table(title, tuple(columns), tuple(lines)))
    return found


def _cell(column, values) -> Cell:
    if column.key not in values:
        return Cell("-")
    value = values[column.key]
    one = value if isinstance(value, Estimate) else Estimate(np.nan if value is None else value, np.nan, np.nan)
    if np.isnan(one.value):
        return Cell("undefined")
    text, low, high = (format(column.scale * number, column.form) for number in (one.value, one.low, one.high))
    return Cell(text, "" if np.isnan(one.low) else f"[{low}, {high}]", one.best, one.tied and not one.best)


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown(title: str, notes: Sequence[str], found: Sequence[Table]) -> str:
    """The tables as Markdown."""
    parts = [f"# {_escaped(title)}", *map(_escaped, notes)]
    for table in found:
        header = ["", *(_escaped(f"{column.group} {column.header} {column.arrow}".strip()) for column in table.columns)]
        lines = [[_escaped(line.name), *map(_markdown_cell, line.cells)] for line in table.lines]
        parts += [f"## {table.title}", tabulate(lines, header, tablefmt="github", disable_numparse=True, stralign="left")]
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else f"{cell.text}†" if cell.tied else cell.text
    return f"{text} {cell.interval}".strip()


def _escaped(text: str) -> str:
    return re.sub(r"[\\|<`*\[]", r"\\\g<0>", " ".join(command.printable(text).split()))


# ---------------------------------------------------------------------------------------------------------------- LaTeX

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"<": "$<$", ">": "$>$", "|": "$|$", '"': "''"}
_LATEX |= {"[": "{[}", "*": "{*}"}  # a row break takes them for its own at the start of the next line


def latex(title: str, notes: Sequence[str], found: Sequence[Table]) -> str:
    r"""The tables as LaTeX, for a document with \usepackage{booktabs}."""
    parts = [f"% {line}" for line in " ".join(command.printable(title).split()).split("\n")]
    parts.append(r"% \usepackage{booktabs}")
    for table in found:
        parts += ["", *_latex_table(table, notes)]
    return "\n".join(parts) + "\n"


def _latex_table(table, notes):
    groups, start, heads, rules = table.groups, 2, [], []
    for name, count in groups:
        heads.append(rf"\multicolumn{{{count}}}{{c}}{{{latex_text(name)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    arrows = {"↓": r"$\downarrow$", "↑": r"$\uparrow$"}
    names = [f"{latex_text(column.header)} {arrows[column.arrow]}" for column in table.columns]
    yield r"\begin{table}[t]"
    yield r"\centering\scriptsize\setlength{\tabcolsep}{3pt}"
    yield rf"\caption{{{latex_text(table.title)}. {latex_text(' '.join(notes))}}}"
    yield rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}"
    yield r"\toprule"
    if any(name for name, _ in groups):
        yield f"& {' & '.join(heads)} \\\\"
        yield "".join(rules)
    yield f"& {' & '.join(names)} \\\\"
    section = None
    for line in table.lines:
        if line.section != section:
            yield r"\midrule"
        section = line.section
        yield f"{latex_text(line.name)} & {' & '.join(map(_latex_cell, line.cells))} \\\\"
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _latex_cell(cell: Cell) -> str:
    text = "--" if cell.text == "-" else cell.text
    text = rf"\textbf{{{text}}}" if cell.best else rf"{text}$^\dagger$" if cell.tied else text
    return rf"\shortstack{{{text}\\{{\tiny {cell.interval}}}}}" if cell.interval else text


def latex_text(text: str) -> str:
    r"""A text with LaTeX's own characters escaped.

    >>> latex_text("A_B & 5 %")
    'A\\_B \\& 5 \\%'
    """
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(command.printable(text).split()))


# ----------------------------------------------------------------------------------------------------------------- JSON


def as_json(rows: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, dict]]:
    """{row: {metric: {value, low, high, best, tied, undefined}}}; an undefined value is null."""
    return {
        name: {key: dataclasses.asdict(one) | {"undefined": bool(np.isnan(one.value))} for key, one in values.items()}
        for name, values in rows.items()
    }

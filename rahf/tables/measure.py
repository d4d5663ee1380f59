"""What each example of a row contributes to the metrics, computed in pieces by threads, and kept beside its predictions."""

import contextlib
import dataclasses
import pathlib
import zipfile
import zlib

import numpy as np
from tqdm.auto import tqdm

from rahf import ahead
from rahf.fingerprint import fingerprint
from rahf.tables import predictions
from rahf.tables.predictions import Predictions
from rahf.tables.targets import Targets
from richhf_data import keywords, metrics, paths
from richhf_data.errors import UserError
from richhf_data.metrics import PerExample

THREADS = ahead.THREADS
_CODE = [pathlib.Path(module.__file__) for module in (metrics, keywords, predictions)] + [pathlib.Path(__file__)]


def measure(found: Predictions, targets: Targets, cache) -> PerExample:
    """The metrics of each example of a row, in the targets' order.

    Args:
      cache: a .npz file, which is read if it is of the same predictions, targets and code, and is written otherwise.

    Raises:
      UserError: the predictions lack an example or have one too many; a map is damaged.
    """
    found.check_uids(targets.uids)
    cache, key = pathlib.Path(cache), fingerprint(found.path, targets.path, *_CODE)
    if (values := _read(cache, key)) is not None:
        return values
    places = {uid: place for place, uid in enumerate(targets.uids)}

    def chunks():
        for rows, maps in found.batches(targets.header.heatmap_size):
            order = [places[found.uids[row]] for row in rows]
            yield order, targets.rows(order), [found.row(row, maps and maps[i]) for i, row in enumerate(rows)]

    def values_of(chunk):
        order, truths, rows = chunk
        try:
            return order, metrics.per_example(truths, rows, order)
        except UserError as error:
            raise UserError(f"rows: {found.name}: {found.path}: {error}") from error

    orders, parts = [], []
    with (
        contextlib.closing(ahead.mapped(values_of, chunks(), THREADS, THREADS)) as results,
        tqdm(total=len(places), desc=f"{found.name}: metrics", unit="example", dynamic_ncols=True) as bar,
    ):
        for order, part in results:
            orders += order
            parts.append(part)
            bar.update(len(order))
    values = taken(metrics.concatenate(parts), np.argsort(orders))
    with paths.writing(cache) as partial, partial.open("wb") as file:
        np.savez(file, key=np.array(key), **_arrays(values))
    return values


def taken(values: PerExample, order: np.ndarray) -> PerExample:
    """The examples of some places, in their order."""
    return _of_arrays({name: array[order] for name, array in _arrays(values).items()})


def _arrays(values: PerExample) -> dict[str, np.ndarray]:
    plain = {field.name: getattr(values, field.name) for field in dataclasses.fields(values) if field.name != "heatmaps"}
    return plain | {f"heatmaps/{name}": array for name, array in values.heatmaps.items()}


def _of_arrays(arrays) -> PerExample:
    maps = {name.removeprefix("heatmaps/"): array for name, array in arrays.items() if name.startswith("heatmaps/")}
    return PerExample(heatmaps=maps, **{name: array for name, array in arrays.items() if "/" not in name})


def _read(file: pathlib.Path, key: str) -> PerExample | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) == key:
                return _of_arrays({name: arrays[name] for name in arrays.files if name != "key"})
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):  # not there, or damaged
        pass
    return None

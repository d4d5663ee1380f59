"""Reads the pictures to annotate, and copies them into the project in a form that every browser shows alike.

A source is one of

  FILE.jsonl    {"image": path, "prompt": text} a line, paths relative to the file; "uid", "category", "priority" and a
                critic's "suggestion" may be there too
  DIR           a folder with an images.jsonl, as `rahf.diffusion.sample` writes it
  *.parquet     a table with a column of encoded images and one of prompts or captions
  GLOB          picture files, beside captions.csv, captions.jsonl or captions.parquet (uid, caption)

A picture is named by its "uid", or else by its file without the extension.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from tqdm.auto import tqdm

from richhf_data import checked, image_sources, images, input_files, jsonl, parquet, paths
from richhf_data.annotate import kinds
from richhf_data.annotate.store import PICTURES, New, Store
from richhf_data.errors import UserError

MAX_PROMPT = 20_000  # characters
_EXPECTED = '{"image": path, "prompt": text}'
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Source:
    """A picture that was found: a file, or encoded; `prompt` is None if there is none."""

    uid: str
    prompt: str | None
    data: pathlib.Path | bytes
    more: Mapping = dataclasses.field(default_factory=dict)


def find(pattern: str) -> list[Source]:
    """The pictures of a source, in its order.

    Raises:
      UserError: no picture, pictures without a prompt, two pictures of one name, a name that is no file name.
    """
    path = pathlib.Path(pattern)
    if path.is_dir():
        path = path / "images.jsonl"
        if not path.is_file():
            raise UserError(f"images: {pattern} has no images.jsonl, expected one, or a pattern such as '{pattern}/*.png'")
    if path.suffix == ".jsonl":
        found = list(_lines(path))
    elif path.suffix == ".parquet":
        found = list(_rows(str(path)))
    else:
        found = list(_files(pattern))
    if not found:
        raise UserError(f"images: found no picture by {pattern!r}, expected some; quote a pattern in a shell")
    without = [one.uid for one in found if not one.prompt or not one.prompt.strip()]
    if without:
        more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
        raise UserError(
            f"images: {len(without)} of {len(found)} pictures have no prompt: {', '.join(without[:_NAMED])}{more}; add them "
            'to captions.jsonl beside the pictures, one {"uid": name, "caption": prompt} a line'
        )
    for one in found:
        if not _is_name(one.uid):
            raise UserError(f"images: uid: got {one.uid[:200]!r}, expected a file name of 200 bytes at most")
        if len(one.prompt) > MAX_PROMPT:
            raise UserError(
                f"images: {one.uid}: got a prompt of {len(one.prompt):,} characters, expected {MAX_PROMPT:,} at most"
            )
    return found


def _is_name(uid: str) -> bool:
    plain = uid.isprintable() and jsonl.is_text(uid) and not uid.startswith(".")
    return bool(uid) and plain and pathlib.PurePosixPath(uid).name == uid and len(uid.encode()) <= 200


def _check_different(found: Sequence[Source]) -> None:
    seen: set[str] = set()
    for one in found:
        if one.uid in seen:
            raise UserError(f'images: got two pictures called {one.uid!r}, expected one; give each a "uid" in a .jsonl')
        seen.add(one.uid)


def _lines(path: pathlib.Path) -> Iterator[Source]:
    for number, row in enumerate(jsonl.read(path, "images", _EXPECTED, ("image", "prompt")), 1):
        file, where = path.parent / row["image"], f"images: {path} row {number}"
        more = {}
        if row.get("priority") is not None:
            more["priority"] = checked.conform(float, row["priority"], f"{where}: priority")
        if row.get("suggestion") is not None:
            suggestion = dict(row["suggestion"]) if isinstance(row["suggestion"], dict) else row["suggestion"]
            try:
                more["suggestion"] = kinds.checked_suggestion(row["prompt"], suggestion)
            except UserError as error:
                raise UserError(f"{where}: suggestion: {error}") from error
        yield Source(str(row.get("uid") or file.stem), row["prompt"], file, more)


def _rows(pattern: str) -> Iterator[Source]:
    filesystem, files = parquet.files("images", pattern)
    for name in files:
        with parquet.open_file("images", filesystem.unstrip_protocol(name)) as file:
            leaves = parquet.leaves(file.schema_arrow)
            roles = {role: parquet.GUESSES[role] for role in ("prompt", "image")}
            columns = parquet.choose_columns(leaves, f"images: {name}", {}, roles)
            uid = next((one for one in leaves if one.lower() in ("uid", "image_uid", "id")), None)
            number = 0
            for batch in file.iter_batches(16, columns=[*columns.values(), *([uid] if uid else [])], use_threads=False):
                prompts, encoded = (parquet.values(batch, columns[role]).to_pylist() for role in ("prompt", "image"))
                names = parquet.values(batch, uid).to_pylist() if uid else [None] * len(prompts)
                for prompt, data, own in zip(prompts, encoded, names, strict=True):
                    yield Source(str(own) if own is not None else f"{pathlib.Path(name).stem}_{number}", prompt, data or b"")
                    number += 1


def _files(pattern: str) -> Iterator[Source]:
    files = [pathlib.Path(name) for name in input_files.matches(pattern)]
    files = [file for file in files if file.suffix.lower() in images.EXTENSIONS]
    captions: dict[pathlib.Path, dict[str, str]] = {}
    for folder in dict.fromkeys(file.parent for file in files):
        filesystem, place = parquet.open_url("images", str(folder))
        wanted = {file.stem for file in files if file.parent == folder}
        captions[folder] = image_sources.read_captions(filesystem, place, wanted, {})
    for file in files:
        yield Source(file.stem, captions[file.parent].get(file.stem), file)


def add(store: Store, found: Sequence[Source], gold: Mapping[str, Mapping] | None = None) -> int:
    """Copies pictures into the project and adds their items; returns how many are new.

    A picture that does not decode is left out and noted (`Store.refused`).

    Args:
      gold: uid -> the known answer, of the pictures that have one.

    Raises:
      UserError: two pictures of one name; a name that is there of another picture or prompt; a known answer without picture.
    """
    _check_different(found)
    gold, items = gold or {}, []
    if unknown := gold.keys() - {one.uid for one in found}:
        raise UserError(f"gold: got answers about {min(unknown)!r}, expected a picture of --images")
    there = store.digests()
    for one in tqdm(found, desc="pictures", unit="picture"):
        read = _read(store, one, there.get(one.uid))
        if read is not None:
            digest, plain = read
            files = () if one.uid in there else (_copied(store, one.uid, plain),)
            items.append(New(one.uid, one.prompt, files, digest=digest, gold=gold.get(one.uid), **one.more))
    return store.add(items)


def add_pairs(store: Store, sets: Mapping[str, Sequence[Source]]) -> int:
    """Adds an item for each pair of pictures of one prompt in the two sets; returns how many are new.

    Raises:
      UserError: no two sets, no prompt in common, two pictures of one name in a set; a pair that is there of other pictures.
    """
    if len(sets) != 2:
        raise UserError(f"images: got {len(sets)} sets, expected two for side_by_side: --images=A --images=B")
    (first, ones), (second, others) = sets.items()
    for each in sets.values():
        _check_different(each)
    left: dict[str, list[Source]] = {}
    for other in others:
        left.setdefault(other.prompt, []).append(other)
    pairs = [(one, left[one.prompt].pop(0)) for one in ones if left.get(one.prompt)]
    if not pairs:
        raise UserError(f"images: {first} and {second} have no prompt in common, expected pictures of the same prompts")
    items, there = [], store.digests()
    for one, other in tqdm(pairs, desc="pairs", unit="pair"):
        uid = f"{first}/{one.uid} {second}/{other.uid}"
        known = there.get(uid, " ").split(" ")
        read = [_read(store, each, digest) for each, digest in zip((one, other), known, strict=True)]
        if None not in read:
            files = () if uid in there else tuple(_copied(store, *each) for each in read)
            items.append(New(uid, one.prompt, files, names=(first, second), digest=" ".join(digest for digest, _ in read)))
    return store.add(items)


def _read(store: Store, one: Source, known: str | None) -> tuple[str, bytes | None] | None:
    """A picture's digest, and as browsers show it, unless the digest is known; None, and a note, for what is no picture."""
    try:
        data = one.data if isinstance(one.data, bytes) else images.read_bytes(one.data)
        digest = images.digest(data)
        return digest, None if digest == known else images.plain(data)[0]
    except UserError as error:
        store.refuse(one.uid, str(error))
        return None


def _copied(store: Store, name: str, plain: bytes) -> str:
    """The name of the picture's file in the project's folder."""
    file = f"{name}.{'png' if images.extension(plain) == 'png' else 'jpg'}"
    paths.replace(store.folder / PICTURES / file, plain)
    return file

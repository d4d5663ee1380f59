"""What a dataset is built from: the contract between a source of examples and builder.py.

`builder.RecordFiles` and the classes of tables.py fulfil it.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Item:
    """An example as a source gives it to the builder.

    Attributes:
      uid: its name within the dataset.
      prompt: what the encoder reads.
      image: encoded, as `images.plain` returns it; None when there is a problem.
      raw: its targets as a raw record (records.py), without the absent ones.
      where: its place in the source, for errors.
      caption: what the decoder writes in place of the prompt with its labels, or None.
      changes: what `images.plain` changed in the image.
      problem: a key of `builder.PROBLEMS` and the reason, or None.
    """

    uid: str
    prompt: str
    image: bytes | None
    raw: dict
    where: str
    caption: str | None = None
    changes: str = ""
    problem: tuple[str, str] | None = None


class ExampleSource(Protocol):
    """A source of examples.

    Attributes:
      splits: those of `builder.SPLITS` that it has, in that order.
      published: whether its counts should be those of RichHF-18K.
      references: the path of a references.json beside the data, or None.
      remedy: what a user can do about missing images, for errors.
    """

    splits: tuple[str, ...]
    published: bool
    references: pathlib.Path | None
    remedy: str

    def identity(self) -> Any:
        """JSON that changes with the records or tables: tells the builder whether a dataset is built from them."""

    def examples(self, split: str) -> Iterator[Item]:
        """Yields every example of a split, those with a problem too."""

    def notes(self, split: str) -> dict[str, list[str]]:
        """What `examples` dropped or noticed, for the report: {what: names}. Valid after `examples` has ended."""

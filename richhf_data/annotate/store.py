"""The project's database: pictures, annotators, and who answered what. One SQLite file in write-ahead mode.

A project has items (a picture and its prompt, or two pictures). Each item is given to `wanted` different annotators.
`next_item` leases an item to an annotator; a lease that is not renewed within `lease_seconds` ends, and the item goes to
another one. Items that were begun come first, so that items are finished. Gold items have a known answer; everybody gets
them.

A row of `work` is one annotator's share in one item; its states:

  leased    on the screen; holds one of the item's places
  done      answered; holds a place
  skipped   passed over with a reason; holds a place
  expired   the lease ended; the draft is kept, no place
  late      answered when all places were taken; kept, and not exported
"""

import contextlib
import dataclasses
import hmac
import json
import pathlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from richhf_data.annotate import kinds
from richhf_data.errors import UserError

FILE = "annotations.sqlite"
PICTURES = "pictures"  # the folder with copies of the pictures, named by uid
VERSION = 1
_APPLICATION = 0x52414846  # "RAHF": what SQLite keeps as application_id
_BUSY_SECONDS = 30

_SCHEMA = """
CREATE TABLE project (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE items (
  id INTEGER PRIMARY KEY,
  uid TEXT NOT NULL UNIQUE,
  prompt TEXT NOT NULL,
  pictures TEXT NOT NULL,           -- JSON: names of files in the folder of pictures
  names TEXT NOT NULL,              -- JSON: the sets that the pictures are of, side by side
  wanted INTEGER NOT NULL,
  taken INTEGER NOT NULL DEFAULT 0,     -- places: leased, done, skipped
  finished INTEGER NOT NULL DEFAULT 0,  -- done, skipped
  gold TEXT,                        -- JSON: the known answer
  suggestion TEXT,                  -- JSON: a critic's prediction
  priority REAL NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX open_items ON items (taken DESC, priority DESC, id) WHERE taken < wanted AND gold IS NULL;
CREATE TABLE annotators (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  generation INTEGER NOT NULL DEFAULT 0,  -- of the link: a new one ends the earlier ones
  administrator INTEGER NOT NULL DEFAULT 0,
  revoked INTEGER NOT NULL DEFAULT 0,
  admitted INTEGER NOT NULL DEFAULT 0   -- past the qualification, by an administrator
) STRICT;
CREATE TABLE work (
  item INTEGER NOT NULL REFERENCES items (id),
  annotator INTEGER NOT NULL REFERENCES annotators (id),
  state TEXT NOT NULL,
  began REAL NOT NULL,
  expires REAL NOT NULL,
  ended REAL,
  seconds REAL,                     -- as the browser counted them while the page was seen
  draft TEXT,
  answer TEXT,
  reason TEXT,
  suggested INTEGER NOT NULL DEFAULT 0,
  revision INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (item, annotator)
) STRICT, WITHOUT ROWID;
CREATE INDEX work_of ON work (annotator, state, ended);
CREATE INDEX leases ON work (expires) WHERE state = 'leased';
CREATE TABLE refused (name TEXT PRIMARY KEY, reason TEXT NOT NULL) STRICT;
"""
# A trigger on each change of `work` keeps the items' counts right, whatever changed it.
for _event, _row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
    _SCHEMA += f"""
CREATE TRIGGER count_{_event.lower()} AFTER {_event} ON work BEGIN
  UPDATE items SET
    taken = (SELECT count(*) FROM work WHERE item = {_row}.item AND state IN ('leased', 'done', 'skipped')),
    finished = (SELECT count(*) FROM work WHERE item = {_row}.item AND state IN ('done', 'skipped'))
  WHERE id = {_row}.item;
END;
"""


class Refused(UserError):
    """A request that the project cannot serve; `status` is its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a project asks, and of how many.

    Attributes:
      kind: one of `kinds.KINDS`. questions: of the kind "rich". question: of the kind "side_by_side".
      wanted: annotators an item. lease_seconds: without a sign of life, after which an item goes to another annotator.
      gold_every: one item in so many is gold, if there are gold items. qualify: gold items before the first other one.
      qualify_share: the least mean agreement with them, in [0, 1].
      suggest: show suggestions, and record that.
    """

    kind: str = "rich"
    questions: tuple[str, ...] = kinds.QUESTIONS
    question: str = "Which picture do you prefer?"
    wanted: int = 3
    lease_seconds: float = 900.0
    gold_every: int = 10
    qualify: int = 0
    qualify_share: float = 0.6
    suggest: bool = False


@dataclasses.dataclass(frozen=True)
class Annotator:
    """A person with a link."""

    id: int
    name: str
    administrator: bool
    admitted: bool


@dataclasses.dataclass(frozen=True)
class New:
    """An item to add; see the table."""

    uid: str
    prompt: str
    pictures: tuple[str, ...]
    names: tuple[str, ...] = ()
    gold: Mapping | None = None
    suggestion: Mapping | None = None
    priority: float = 0.0


class Store:
    """A project's database. Its methods may be called by any thread.

    Args:
      workdir: the project's folder.
      given: fields of `Settings`, of a new project, or to change. None opens a project that is there.

    Raises:
      UserError: no project there, a file that is no project, one of another version or with other settings.
    """

    def __init__(self, workdir, given: Mapping | None = None, clock=time.time):
        self.folder, self._clock = pathlib.Path(workdir), clock
        self._lock = threading.Lock()
        file = self.folder / FILE
        if given is None and not file.is_file():
            raise UserError(f"workdir: {self.folder} has no {FILE}, expected an annotation project; `serve` makes one")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / PICTURES).mkdir(exist_ok=True)
        self._db = sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            self._open(file, given)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise UserError(
                    f"workdir: {file}: {error}; expected a project of this command; take another folder"
                ) from error
            raise

    def _open(self, file: pathlib.Path, given: Mapping | None) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # an answer that was confirmed survives a loss of power
        self._db.execute("PRAGMA foreign_keys = ON")
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        empty = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if empty and given is not None:
            begin = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION};"
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {begin} COMMIT;")
            values = dataclasses.asdict(Settings(**given)) | {"secret": secrets.token_hex(32), "paused": False}
            with self._transaction() as db:
                pairs = [(key, json.dumps(value)) for key, value in values.items()]
                db.executemany("INSERT INTO project VALUES (?, ?)", pairs)
        elif application != _APPLICATION:
            raise UserError(f"workdir: {file} is the database of another program, expected a project; take another folder")
        elif version != VERSION:
            raise UserError(f"workdir: {file} has version {version}, expected {VERSION}; use the code that wrote it")
        found = self._project()
        self.secret = bytes.fromhex(found.pop("secret"))
        found.pop("paused")
        self.settings = Settings(**found | {"questions": tuple(found["questions"])})
        for name, value in (given or {}).items():
            if name in ("kind", "questions") and value != getattr(self.settings, name):
                there = getattr(self.settings, name)
                raise UserError(f"{name}: got {value!r}, expected {there!r}, that of the project in {self.folder}")
        self.settings = dataclasses.replace(self.settings, **given or {})
        with self._transaction() as db:
            for key, value in dataclasses.asdict(self.settings).items():
                db.execute("UPDATE project SET value = ? WHERE key = ?", (json.dumps(value), key))

    def close(self) -> None:
        """Closes the database; what was begun by another thread is finished first."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _project(self) -> dict[str, Any]:
        return {row["key"]: json.loads(row["value"]) for row in self._rows("SELECT key, value FROM project")}

    # ---- The project ------------------------------------------------------------------------------------------------
    @property
    def paused(self) -> bool:
        """Whether no items are given out."""
        return self._project()["paused"]

    def pause(self, paused: bool) -> None:
        """Stops or continues giving items out. Items on screens can still be answered."""
        with self._transaction() as db:
            db.execute("UPDATE project SET value = ? WHERE key = 'paused'", (json.dumps(paused),))

    def add(self, items: Sequence[New], wanted: int | None = None) -> int:
        """Adds items that are not there yet; returns how many.

        Raises:
          UserError: a uid that is there with another prompt.
        """
        added = 0
        with self._transaction() as db:
            for item in items:
                there = db.execute("SELECT prompt FROM items WHERE uid = ?", (item.uid,)).fetchone()
                if there and there["prompt"] != item.prompt:
                    expected = f"that of the project, {there['prompt'][:80]!r}; name the picture otherwise"
                    raise UserError(f"{item.uid}: got the prompt {item.prompt[:80]!r}, expected {expected}")
                if there:
                    continue
                gold, suggestion = (None if one is None else json.dumps(one) for one in (item.gold, item.suggestion))
                row = (
                    item.uid,
                    item.prompt,
                    json.dumps(item.pictures),
                    json.dumps(item.names),
                    wanted or self.settings.wanted,
                )
                db.execute(
                    "INSERT INTO items (uid, prompt, pictures, names, wanted, gold, suggestion, priority) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (*row, gold, suggestion, item.priority),
                )
                added += 1
        return added

    def refuse(self, name: str, reason: str) -> None:
        """Notes a picture that cannot be annotated, for the administrator."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO refused VALUES (?, ?)", (name[:500], reason[:500]))

    def refused(self) -> list[tuple[str, str]]:
        """(name, reason) of the pictures that cannot be annotated."""
        return [(row["name"], row["reason"]) for row in self._rows("SELECT name, reason FROM refused ORDER BY name")]

    # ---- Annotators -------------------------------------------------------------------------------------------------
    def invite(self, name: str, administrator: bool = False) -> int:
        """The id of an annotator, who is added if the name is new.

        Raises:
          UserError: a name that is blank, longer than 100 characters or not printable.
        """
        name = name.strip()
        if not 0 < len(name) <= 100 or not name.isprintable():
            raise UserError(f"annotator: got the name {name[:100]!r}, expected 1 to 100 printable characters")
        with self._transaction() as db:
            row = (name, int(administrator))
            db.execute("INSERT INTO annotators (name, administrator) VALUES (?, ?) ON CONFLICT (name) DO NOTHING", row)
            return db.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()["id"]

    def key(self, annotator: int) -> str:
        """The secret part of an annotator's link. It cannot be guessed; `renew` and `revoke` end it."""
        (row,) = self._rows("SELECT generation FROM annotators WHERE id = ?", annotator)
        mac = hmac.digest(self.secret, f"link {annotator} {row['generation']}".encode(), "sha256")
        return f"{annotator}-{mac[:24].hex()}"

    def enter(self, key: str) -> Annotator | None:
        """The annotator of a link's key; None if there is none, or it was revoked."""
        number = key.partition("-")[0]
        rows = self._rows("SELECT * FROM annotators WHERE id = ? AND NOT revoked", int(number)) if _is_id(number) else []
        return _annotator(rows[0]) if rows and hmac.compare_digest(self.key(rows[0]["id"]).encode(), key.encode()) else None

    def renew(self, annotator: int) -> None:
        """Ends an annotator's link in favour of a new one, and undoes a revocation."""
        with self._transaction() as db:
            db.execute("UPDATE annotators SET generation = generation + 1, revoked = 0 WHERE id = ?", (annotator,))

    def annotators(self) -> list[sqlite3.Row]:
        """All rows, in the order in which they were invited."""
        return self._rows("SELECT * FROM annotators ORDER BY id")

    def revoke(self, annotator: int) -> None:
        """Closes an annotator's link, and frees what is on their screen. Their answers stay."""
        with self._transaction() as db:
            db.execute("UPDATE annotators SET revoked = 1 WHERE id = ?", (annotator,))
            db.execute("UPDATE work SET state = 'expired' WHERE annotator = ? AND state = 'leased'", (annotator,))

    def admit(self, annotator: int) -> None:
        """Lets an annotator pass the qualification."""
        with self._transaction() as db:
            db.execute("UPDATE annotators SET admitted = 1 WHERE id = ?", (annotator,))

    # ---- Items ------------------------------------------------------------------------------------------------------
    def next_item(self, annotator: Annotator) -> sqlite3.Row | None:
        """The item on the annotator's screen, or a newly leased one; None if there is none for them now.

        Raises:
          Refused: the project is paused, or the annotator did not qualify.
        """
        now = self._clock()
        with self._transaction() as db:
            db.execute("UPDATE work SET state = 'expired' WHERE state = 'leased' AND expires < ?", (now,))
            own = db.execute(
                "SELECT item, state FROM work JOIN items ON id = item WHERE annotator = ? AND (state = 'leased' OR "
                "(state = 'expired' AND (taken < wanted OR gold IS NOT NULL))) "
                "ORDER BY state = 'leased' DESC, began LIMIT 1",
                (annotator.id,),
            ).fetchone()
            if own and own["state"] == "leased":
                return self._item(db, own["item"], annotator.id)
            if json.loads(db.execute("SELECT value FROM project WHERE key = 'paused'").fetchone()["value"]):
                raise Refused(423, "The project is paused. Come back later.")
            item = own["item"] if own else self._choose(db, annotator)
            if item is None:
                return None
            shown = (
                self.settings.suggest
                and db.execute("SELECT suggestion IS NOT NULL AND gold IS NULL FROM items WHERE id = ?", (item,)).fetchone()[
                    0
                ]
            )
            db.execute(
                "INSERT INTO work (item, annotator, state, began, expires, suggested) VALUES (?, ?, 'leased', ?, ?, ?) "
                "ON CONFLICT (item, annotator) DO UPDATE SET state = 'leased', expires = excluded.expires",
                (item, annotator.id, now, now + self.settings.lease_seconds, int(shown)),
            )
            return self._item(db, item, annotator.id)

    def _choose(self, db: sqlite3.Connection, annotator: Annotator) -> int | None:
        """The id of an item that the annotator has not seen: a gold one if it is its turn, else the one that is furthest."""
        seen = "id NOT IN (SELECT item FROM work WHERE annotator = :annotator)"
        gold = db.execute(
            f"SELECT id FROM items WHERE gold IS NOT NULL AND {seen} ORDER BY id LIMIT 1", {"annotator": annotator.id}
        ).fetchone()
        known = db.execute(
            "SELECT answer, gold FROM work JOIN items ON id = item "
            "WHERE annotator = ? AND gold IS NOT NULL AND state = 'done' ORDER BY ended",
            (annotator.id,),
        ).fetchall()
        if len(known) < self.settings.qualify and gold:
            return gold["id"]
        tried = known[: self.settings.qualify]
        if tried and not annotator.admitted and self._accuracy(tried) < self.settings.qualify_share:
            raise Refused(403, "Thank you. Your answers differ from what this project looks for, so it ends here for you.")
        (others,) = db.execute(
            "SELECT count(*) FROM work JOIN items ON id = item WHERE annotator = ? AND gold IS NULL", (annotator.id,)
        ).fetchone()
        due = others // max(self.settings.gold_every - 1, 1) > len(known) - self.settings.qualify
        if gold and due:
            return gold["id"]
        row = db.execute(
            f"SELECT id FROM items WHERE taken < wanted AND gold IS NULL AND {seen} "
            "ORDER BY taken DESC, priority DESC, id LIMIT 1",
            {"annotator": annotator.id},
        ).fetchone()
        return row["id"] if row else None

    def _accuracy(self, rows) -> float:
        agreements = [
            kinds.agreement(self.settings.kind, json.loads(row["answer"]), json.loads(row["gold"])) for row in rows
        ]
        return sum(agreements) / len(agreements)

    def _item(self, db: sqlite3.Connection, item: int, annotator: int) -> sqlite3.Row | None:
        return db.execute(
            "SELECT * FROM work JOIN items ON id = item WHERE item = ? AND annotator = ?", (item, annotator)
        ).fetchone()

    def item(self, item: int, annotator: Annotator) -> sqlite3.Row:
        """An item that the annotator has or had on the screen, with their work.

        Raises:
          Refused: there is none.
        """
        with self._lock:
            row = self._item(self._db, item, annotator.id)
        if row is None:
            raise Refused(404, "There is no such picture for you.")
        return row

    def left(self, annotator: Annotator) -> int:
        """How many items could still be given to the annotator now."""
        query = "SELECT count(*) FROM items WHERE taken < wanted AND gold IS NULL AND id NOT IN "
        return self._rows(query + "(SELECT item FROM work WHERE annotator = ? AND state != 'expired')", annotator.id)[0][0]

    def answered(self, annotator: Annotator) -> list[int]:
        """The items that the annotator answered or skipped, the latest last."""
        rows = self._rows(
            "SELECT item FROM work WHERE annotator = ? AND state IN ('done', 'skipped', 'late') ORDER BY ended, item",
            annotator.id,
        )
        return [row["item"] for row in rows]

    def draft(self, item: int, annotator: Annotator, draft) -> None:
        """Keeps a draft and renews the lease.

        Raises:
          Refused: the item was never on this annotator's screen.
        """
        text = json.dumps(draft)
        with self._transaction() as db:
            row = self._item(db, item, annotator.id)
            if row is None:
                raise Refused(404, "There is no such picture for you.")
            expires = self._clock() + self.settings.lease_seconds
            db.execute(
                "UPDATE work SET draft = ?, expires = ? WHERE item = ? AND annotator = ?",
                (text, expires, item, annotator.id),
            )

    def answer(self, item: int, annotator: Annotator, value, revision: int, seconds: float) -> tuple[str, int]:
        """Keeps an answer, or replaces this annotator's earlier one; the same answer twice is kept once.

        Args:
          value: see `kinds`. revision: of the work as the browser read it. seconds: that the browser counted.

        Returns:
          "done", or "late" where all places were taken meanwhile; and the new revision.

        Raises:
          UserError: a wrong answer. Refused: no such item, or it was answered in another window meanwhile.
        """
        with self._lock:
            row = self._item(self._db, item, annotator.id)
        if row is None:
            raise Refused(404, "There is no such picture for you.")
        checked = json.dumps(kinds.check(self.settings.kind, self.settings.questions, row["prompt"], value))
        return self._end(item, annotator, "done", revision, seconds, answer=checked)

    def skip(self, item: int, annotator: Annotator, reason: str, revision: int, seconds: float) -> tuple[str, int]:
        """Passes over an item; as `answer`. A reason is one of `kinds.SKIPS`."""
        if reason not in kinds.SKIPS:
            raise UserError(f"reason: got {reason[:80]!r}, expected one of {', '.join(kinds.SKIPS)}")
        return self._end(item, annotator, "skipped", revision, seconds, reason=reason)

    def _end(self, item, annotator, state, revision, seconds, answer=None, reason=None) -> tuple[str, int]:
        with self._transaction() as db:
            row = self._item(db, item, annotator.id)
            if row is None:
                raise Refused(404, "There is no such picture for you.")
            if row["state"] in ("done", "skipped", "late"):
                if (row["answer"], row["reason"]) == (answer, reason):
                    return row["state"], row["revision"]
                if row["revision"] != revision:
                    raise Refused(409, "You answered this picture in another window. Reload to see that answer.")
            room = row["gold"] is not None or row["state"] in ("leased", "done", "skipped") or row["taken"] < row["wanted"]
            state = state if room else "late"
            db.execute(
                "UPDATE work SET state = ?, ended = coalesce(ended, ?), seconds = coalesce(seconds, 0) + ?, answer = ?, "
                "reason = ?, draft = NULL, revision = revision + 1 WHERE item = ? AND annotator = ?",
                (state, self._clock(), seconds, answer, reason, item, annotator.id),
            )
            return state, row["revision"] + 1

    def picture(self, item: int, number: int, annotator: Annotator) -> pathlib.Path:
        """The file of a picture as the annotator sees them: side by side, 0 is the left one.

        Raises:
          Refused: the annotator never had it on the screen, and is no administrator.
        """
        if annotator.administrator:
            rows = self._rows("SELECT pictures FROM items WHERE id = ?", item)
            files = json.loads(rows[0]["pictures"]) if rows else []
        else:
            files = json.loads(self.item(item, annotator)["pictures"])
            files = files[::-1] if self.swapped(item, annotator.id) else files
        if not 0 <= number < len(files):
            raise Refused(404, "There is no such picture for you.")
        return self.folder / PICTURES / files[number]

    def swapped(self, item: int, annotator: int) -> bool:
        """Whether this annotator sees the two pictures of an item in the other order; always the same."""
        digest = hmac.digest(self.secret, f"sides {item} {annotator}".encode(), "sha256")
        return self.settings.kind == "side_by_side" and bool(digest[0] & 1)

    # ---- For the administrator, and out -----------------------------------------------------------------------------
    def another_opinion(self, item: int) -> None:
        """Asks one more annotator about an item."""
        with self._transaction() as db:
            db.execute("UPDATE items SET wanted = max(wanted, finished) + 1 WHERE id = ?", (item,))

    def items(self) -> list[sqlite3.Row]:
        """All items, in the order in which they were added."""
        return self._rows("SELECT * FROM items ORDER BY id")

    def one(self, item: int) -> sqlite3.Row:
        """An item by its number. Raises Refused if there is none."""
        rows = self._rows("SELECT * FROM items WHERE id = ?", item)
        if not rows:
            raise Refused(404, "There is no such item.")
        return rows[0]

    def work(self, item: int | None = None) -> list[sqlite3.Row]:
        """The work of all annotators, with their names, or that on one item; ordered by item and annotator."""
        which = "" if item is None else "WHERE item = ?"
        joined = "SELECT work.*, annotators.name FROM work JOIN annotators ON annotators.id = annotator"
        return self._rows(f"{joined} {which} ORDER BY item, annotator", *(() if item is None else (item,)))


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _annotator(row: sqlite3.Row) -> Annotator:
    return Annotator(row["id"], row["name"], bool(row["administrator"]), bool(row["admitted"]))

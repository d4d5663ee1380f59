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
HISTORY = 300  # answers that an annotator can go back to
_WORK = "SELECT work.*, annotators.name FROM work JOIN annotators ON annotators.id = annotator"

_SCHEMA = """
CREATE TABLE project (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE items (
  id INTEGER PRIMARY KEY,
  uid TEXT NOT NULL UNIQUE,
  prompt TEXT NOT NULL,
  pictures TEXT NOT NULL,           -- JSON: names of files in the folder of pictures
  digest TEXT NOT NULL,             -- of the pictures as they were read
  names TEXT NOT NULL,              -- JSON: the sets that the pictures are of, side by side
  wanted INTEGER NOT NULL,
  taken INTEGER NOT NULL DEFAULT 0,     -- places: leased, done, skipped
  finished INTEGER NOT NULL DEFAULT 0,  -- done, skipped
  gold TEXT,                        -- JSON: the known answer
  suggestion TEXT,                  -- JSON: a critic's prediction
  priority REAL NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX open_items ON items (taken DESC, priority DESC, id) WHERE taken < wanted AND gold IS NULL;
CREATE INDEX gold_items ON items (id) WHERE gold IS NOT NULL;
CREATE TABLE annotators (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  generation INTEGER NOT NULL DEFAULT 0,  -- of the link: a new one ends the earlier ones
  administrator INTEGER NOT NULL DEFAULT 0,
  revoked INTEGER NOT NULL DEFAULT 0,
  admitted INTEGER                  -- 1 past the qualification, 0 not, NULL not yet known
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


@dataclasses.dataclass(frozen=True)
class New:
    """An item to add; see the table."""

    uid: str
    prompt: str
    pictures: tuple[str, ...]
    names: tuple[str, ...] = ()
    digest: str = ""
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
            if isinstance(error, sqlite3.OperationalError):
                raise UserError(f"workdir: {file}: {error}; make room there, or the right to write") from error
            if isinstance(error, sqlite3.DatabaseError):
                raise UserError(
                    f"workdir: {file}: {error}; expected a project of this command; take another folder"
                ) from error
            raise

    def _open(self, file: pathlib.Path, given: Mapping | None) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # an answer that was confirmed survives a loss of power
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("BEGIN")  # so that all three are of one moment
        application, version, tables = (
            self._db.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        self._db.execute("COMMIT")
        if not tables and given is not None:
            self._create(Settings(**given))
        elif application != _APPLICATION:
            raise UserError(f"workdir: {file} is the database of another program, expected a project; take another folder")
        elif version != VERSION:
            raise UserError(f"workdir: {file} has version {version}, expected {VERSION}; use the code that wrote it")
        found = self._project()
        self.secret = bytes.fromhex(found.pop("secret"))
        found.pop("paused")
        self.settings = Settings(**found | {"questions": tuple(found["questions"])})
        if not given:
            return
        for name, value in given.items():
            if name in ("kind", "questions") and value != getattr(self.settings, name):
                there = getattr(self.settings, name)
                raise UserError(f"{name}: got {value!r}, expected {there!r}, that of the project in {self.folder}")
        before, self.settings = self.settings, dataclasses.replace(self.settings, **given)
        with self._transaction() as db:
            for key, value in given.items():
                db.execute("UPDATE project SET value = ? WHERE key = ?", (json.dumps(value), key))
            db.execute("UPDATE items SET wanted = ? WHERE wanted = ?", (self.settings.wanted, before.wanted))

    def _create(self, settings: Settings) -> None:
        """Makes the tables and the settings in one transaction."""
        values = dataclasses.asdict(settings) | {"secret": secrets.token_hex(32), "paused": False}
        texts = {key: json.dumps(value).replace("'", "''") for key, value in values.items()}
        rows = ", ".join(f"('{key}', '{text}')" for key, text in texts.items())
        begin = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION};"
        self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} INSERT INTO project VALUES {rows}; {begin} COMMIT;")

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

    def digests(self) -> dict[str, str]:
        """uid -> the digest of the pictures of each item that is there."""
        return {row["uid"]: row["digest"] for row in self._rows("SELECT uid, digest FROM items")}

    def add(self, items: Sequence[New]) -> int:
        """Adds items; of those that are there, takes over the known answer, the suggestion and the priority.

        Returns:
          how many are new.

        Raises:
          UserError: a uid that is there with another prompt or other pictures.
        """
        added = 0
        with self._transaction() as db:
            for item in items:
                there = db.execute("SELECT * FROM items WHERE uid = ?", (item.uid,)).fetchone()
                gold, suggestion = (None if one is None else json.dumps(one) for one in (item.gold, item.suggestion))
                if there is None:
                    files, names = json.dumps(item.pictures), json.dumps(item.names)
                    row = (item.uid, item.prompt, files, item.digest, names, self.settings.wanted, gold, suggestion)
                    db.execute(
                        "INSERT INTO items (uid, prompt, pictures, digest, names, wanted, gold, suggestion, priority) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (*row, item.priority),
                    )
                    added += 1
                    continue
                for name in ("prompt", "digest"):
                    if there[name] != getattr(item, name):
                        what = f"the prompt {item.prompt[:80]!r}" if name == "prompt" else "another picture"
                        raise UserError(f"{item.uid}: got {what}, expected that of the project; name the picture otherwise")
                db.execute(
                    "UPDATE items SET gold = coalesce(?, gold), suggestion = coalesce(?, suggestion), priority = ? "
                    "WHERE id = ?",
                    (gold, suggestion, item.priority or there["priority"], there["id"]),
                )
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
        mac = self.mac(f"link {annotator} {row['generation']}")
        return f"{annotator}-{mac[:24].hex()}"

    def enter(self, key: str) -> Annotator | None:
        """The annotator of a link's key; None if there is none, or it was revoked."""
        number = key.partition("-")[0]
        rows = self._rows("SELECT * FROM annotators WHERE id = ? AND NOT revoked", int(number)) if _is_id(number) else []
        if not rows or not hmac.compare_digest(self.key(rows[0]["id"]).encode(), key.encode()):
            return None
        return Annotator(rows[0]["id"], rows[0]["name"], bool(rows[0]["administrator"]))

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
                "SELECT item, state FROM work JOIN items ON id = item WHERE annotator = ? "
                "AND state IN ('leased', 'expired') AND (state = 'leased' OR taken < wanted OR gold IS NOT NULL) "
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
            (suggested,) = db.execute("SELECT suggestion IS NOT NULL FROM items WHERE id = ?", (item,)).fetchone()
            shown = self.settings.suggest and suggested
            db.execute(
                "INSERT INTO work (item, annotator, state, began, expires, suggested) VALUES (?, ?, 'leased', ?, ?, ?) "
                "ON CONFLICT (item, annotator) DO UPDATE SET state = 'leased', expires = excluded.expires",
                (item, annotator.id, now, now + self.settings.lease_seconds, int(shown)),
            )
            return self._item(db, item, annotator.id)

    def _choose(self, db: sqlite3.Connection, annotator: Annotator) -> int | None:
        """The id of an item that the annotator has not seen: a gold one if it is its turn, else the one that is furthest."""
        seen = "id NOT IN (SELECT item FROM work WHERE annotator = :annotator)"
        values = {"annotator": annotator.id}
        unseen = [row["id"] for row in db.execute(f"SELECT id FROM items WHERE gold IS NOT NULL AND {seen}", values)]
        gold = min(unseen, key=lambda item: self.mac(f"gold {item} {annotator.id}"), default=None)
        known = self._known(db, annotator)
        (admitted,) = db.execute("SELECT admitted FROM annotators WHERE id = ?", (annotator.id,)).fetchone()
        qualify = self.settings.qualify
        if len(known) < qualify and gold:
            return gold
        if qualify and admitted == 0:
            raise Refused(403, "Thank you. Your answers differ from what this project looks for, so it ends here for you.")
        (others,) = db.execute(
            "SELECT count(*) FROM work JOIN items ON id = item WHERE annotator = ? AND gold IS NULL", (annotator.id,)
        ).fetchone()
        if gold and others // (self.settings.gold_every - 1) > len(known) - qualify:
            return gold
        row = db.execute(
            f"SELECT id FROM items WHERE taken < wanted AND gold IS NULL AND {seen} "
            "ORDER BY taken DESC, priority DESC, id LIMIT 1",
            values,
        ).fetchone()
        return row["id"] if row else None

    def _known(self, db: sqlite3.Connection, annotator: Annotator) -> list[sqlite3.Row]:
        """The gold items that the annotator ended, in that order."""
        return db.execute(
            "SELECT answer, gold FROM work JOIN items ON id = item "
            "WHERE annotator = ? AND gold IS NOT NULL AND state IN ('done', 'skipped') ORDER BY ended",
            (annotator.id,),
        ).fetchall()

    def _judge(self, db: sqlite3.Connection, annotator: Annotator) -> None:
        """Decides once whether the annotator is admitted: after the last gold item of the qualification. A skip counts 0."""
        known, kind = self._known(db, annotator)[: self.settings.qualify], self.settings.kind
        if not self.settings.qualify or len(known) < self.settings.qualify:
            return
        shares = [kinds.agreement(kind, *map(json.loads, row)) if row["answer"] else 0.0 for row in known]
        passed = int(sum(shares) / len(shares) >= self.settings.qualify_share)
        db.execute("UPDATE annotators SET admitted = ? WHERE id = ? AND admitted IS NULL", (passed, annotator.id))

    def _item(self, db: sqlite3.Connection, item: int, annotator: int) -> sqlite3.Row:
        query = "SELECT * FROM work JOIN items ON id = item WHERE item = ? AND annotator = ?"
        row = db.execute(query, (item, annotator)).fetchone()
        if row is None:
            raise Refused(404, "There is no such picture for you.")
        return row

    def item(self, item: int, annotator: Annotator) -> sqlite3.Row:
        """An item that the annotator has or had on the screen, with their work.

        Raises:
          Refused: there is none.
        """
        with self._lock:
            return self._item(self._db, item, annotator.id)

    def left(self, annotator: Annotator) -> int:
        """How many items could still be given to the annotator now, with the one on the screen."""
        (row,) = self._rows(
            "SELECT (SELECT count(*) FROM items WHERE (taken < wanted OR gold IS NOT NULL) AND id NOT IN "
            "(SELECT item FROM work WHERE annotator = ?1 AND state != 'expired')) + "
            "(SELECT count(*) FROM work WHERE annotator = ?1 AND state = 'leased')",
            annotator.id,
        )
        return row[0]

    def answered(self, annotator: Annotator) -> tuple[int, list[int]]:
        """How many items the annotator answered or skipped, and the latest `HISTORY` of them, the last one last."""
        query = "FROM work WHERE annotator = ? AND state IN ('done', 'skipped', 'late')"
        rows = self._rows(f"SELECT item {query} ORDER BY ended DESC, item DESC LIMIT {HISTORY}", annotator.id)
        count = self._rows(f"SELECT count(*) {query}", annotator.id)[0][0]
        return count, [row["item"] for row in reversed(rows)]

    def draft(self, item: int, annotator: Annotator, draft, revision: int) -> bool:
        """Keeps a draft, and renews the lease, or takes it again if a place is free.

        Args:
          draft: None keeps the one that is there. revision: of the work as the browser read it; a draft of an earlier one is
            dropped.

        Returns:
          whether the annotator still holds a place.

        Raises:
          Refused: the item was never on this annotator's screen.
        """
        text = None if draft is None else json.dumps(draft)
        with self._transaction() as db:
            row = self._item(db, item, annotator.id)
            free = row["gold"] is not None or row["taken"] < row["wanted"]
            state = "leased" if row["state"] == "expired" and free else row["state"]
            if row["revision"] == revision:
                db.execute(
                    "UPDATE work SET draft = coalesce(?, draft), expires = ?, state = ? WHERE item = ? AND annotator = ?",
                    (text, self._clock() + self.settings.lease_seconds, state, item, annotator.id),
                )
            return state != "expired"

    def answer(self, item: int, annotator: Annotator, value, revision: int, seconds: float) -> tuple[str, int]:
        """Keeps an answer, or replaces this annotator's earlier one; the same answer twice is kept once.

        Args:
          value: see `kinds`. revision: of the work as the browser read it. seconds: that the browser counted.

        Returns:
          "done", or "late" where all places were taken meanwhile; and the new revision.

        Raises:
          UserError: a wrong answer. Refused: no such item, or it was answered in another window meanwhile.
        """
        prompt = self.item(item, annotator)["prompt"]
        checked = json.dumps(kinds.check(self.settings.kind, self.settings.questions, prompt, value))
        return self._end(item, annotator, "done", revision, seconds, answer=checked)

    def skip(self, item: int, annotator: Annotator, reason: str, revision: int, seconds: float) -> tuple[str, int]:
        """Passes over an item; as `answer`. A reason is one of `kinds.SKIPS`."""
        if reason not in kinds.SKIPS:
            raise UserError(f"reason: got {reason[:80]!r}, expected one of {', '.join(kinds.SKIPS)}")
        return self._end(item, annotator, "skipped", revision, seconds, reason=reason)

    def _end(self, item, annotator, state, revision, seconds, answer=None, reason=None) -> tuple[str, int]:
        with self._transaction() as db:
            row = self._item(db, item, annotator.id)
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
            if row["gold"] is not None:
                self._judge(db, annotator)
            return state, row["revision"] + 1

    def picture(self, item: int, number: int, annotator: Annotator) -> pathlib.Path:
        """The file of a picture as the annotator sees them: side by side, 0 is the left one.

        Raises:
          Refused: the annotator never had it on the screen.
        """
        row = self.item(item, annotator)
        files = json.loads(row["pictures"])
        return self._file(files[::-1] if self.swapped(item, annotator.id) else files, number)

    def original(self, item: int, number: int) -> pathlib.Path:
        """The file of a picture, for the administrator: side by side in the order of the sets."""
        return self._file(json.loads(self.one(item)["pictures"]), number)

    def _file(self, files: list[str], number: int) -> pathlib.Path:
        if not 0 <= number < len(files):
            raise Refused(404, "There is no such picture for you.")
        return self.folder / PICTURES / files[number]

    def swapped(self, item: int, annotator: int) -> bool:
        """Whether this annotator sees the two pictures of an item in the other order; always the same."""
        return self.settings.kind == "side_by_side" and bool(self.mac(f"sides {item} {annotator}")[0] & 1)

    def mac(self, text: str) -> bytes:
        """32 bytes that depend on the text and the project, and that nobody else can compute."""
        return hmac.digest(self.secret, text.encode(), "sha256")

    # ---- For the administrator, and out -----------------------------------------------------------------------------
    def another_opinion(self, item: int) -> None:
        """Asks one more annotator about an item."""
        with self._transaction() as db:
            db.execute("UPDATE items SET wanted = max(wanted, finished) + 1 WHERE id = ?", (item,))

    def snapshot(self) -> tuple[list[sqlite3.Row], list[sqlite3.Row]]:
        """`items` and `work` of one moment."""
        with self._lock:
            self._db.execute("BEGIN")
            try:
                items = self._db.execute("SELECT * FROM items ORDER BY id").fetchall()
                return items, self._db.execute(f"{_WORK} ORDER BY item, annotator").fetchall()
            finally:
                self._db.execute("COMMIT")

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
        return self._rows(f"{_WORK} {which} ORDER BY item, annotator", *(() if item is None else (item,)))


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10

"""What the administrator's page shows: progress, and how each annotator works."""

import collections
import json
import statistics
import time
from typing import Any

from richhf_data import schema
from richhf_data.annotate import kinds
from richhf_data.annotate.store import Store

ENOUGH = 10  # answers before an annotator is flagged
QUICK = {"rich": 5.0, "binary": 0.7, "side_by_side": 1.0}  # seconds an item; a smaller median is flagged
COMPARED = 200  # of an annotator's answers, the latest, with the others'
_RATE_OVER = 3600.0  # seconds


def overview(store: Store, now: float | None = None) -> dict[str, Any]:
    """Progress, annotators, items that need a look, and pictures that could not be read.

    Returns:
      {count, gold, finished, answers, wanted: numbers; eta: seconds or None; paused; annotators: a list of dicts; left_out:
      items that most annotators skipped; refused: (name, reason); rows: the items, those that need answers first}
    """
    now = time.time() if now is None else now
    rows, work = store.snapshot()
    items = {row["id"]: row for row in rows}
    work = [dict(row) | {"answer": json.loads(row["answer"] or "null")} for row in work]
    plain = [row for row in items.values() if row["gold"] is None]
    finished = sum(row["finished"] >= row["wanted"] for row in plain)
    ended = [row for row in work if row["state"] in ("done", "skipped") and items[row["item"]]["gold"] is None]
    recent = [row for row in ended if row["ended"] > now - _RATE_OVER]
    left_out = skipped(ended)
    missing = sum(max(row["wanted"] - row["finished"], 0) for row in plain)
    since = now - min((row["ended"] for row in recent), default=now)
    eta = missing * since / len(recent) if len(recent) > 1 and missing else None
    return {
        "count": len(plain),
        "gold": len(items) - len(plain),
        "finished": finished,
        "answers": len(ended),
        "wanted": sum(row["wanted"] for row in plain),
        "eta": eta,
        "paused": store.paused,
        "annotators": _annotators(store, items, work),
        "left_out": [row for row in plain if row["id"] in left_out],
        "refused": store.refused(),
        "rows": sorted(plain, key=lambda row: row["finished"] >= row["wanted"]),
    }


def skipped(work) -> set[int]:
    """The items that more annotators skipped than answered."""
    count = collections.Counter()
    for row in work:
        count[row["item"]] += {"skipped": 1, "done": -1}.get(row["state"], 0)
    return {item for item, more in count.items() if more > 0}


def _annotators(store: Store, items, work) -> list[dict[str, Any]]:
    kind, found = store.settings.kind, []
    by_item, by_annotator = collections.defaultdict(list), collections.defaultdict(list)
    for row in work:
        by_annotator[row["annotator"]].append(row)
        if row["state"] == "done":
            by_item[row["item"]].append(row)
    every = [_marks(row["answer"]) for row in work if row["state"] == "done"] if kind == "rich" else []
    usual = statistics.fmean(every) if every else 0.0
    for person in store.annotators():
        own = by_annotator[person["id"]]
        done = [row for row in own if row["state"] == "done"]
        gold = [kinds.agreement(kind, row["answer"], json.loads(items[row["item"]]["gold"])) for row in done
                if items[row["item"]]["gold"] is not None]  # fmt: skip
        others = [
            kinds.agreement(kind, row["answer"], other["answer"])
            for row in sorted(done, key=lambda row: row["ended"])[-COMPARED:]
            for other in by_item[row["item"]]
            if other["annotator"] != person["id"] and items[row["item"]]["gold"] is None
        ]
        seconds = [row["seconds"] for row in done if row["seconds"]]
        found.append({
            "id": person["id"],
            "name": person["name"],
            "administrator": bool(person["administrator"]),
            "revoked": bool(person["revoked"]),
            "done": len(done),
            "skipped": sum(row["state"] == "skipped" for row in own),
            "late": sum(row["state"] == "late" for row in own),
            "seconds": statistics.median(seconds) if seconds else None,
            "gold": statistics.fmean(gold) if gold else None,
            "agreement": statistics.fmean(others) if others else None,
            "flags": _flags(kind, done, seconds, usual),
        })  # fmt: skip
    return found


def _marks(answer) -> int:
    return sum(map(len, answer["points"].values())) + len(answer.get(kinds.WORDS, ()))


def _flags(kind: str, done, seconds, usual: float) -> list[str]:
    if len(done) < ENOUGH:
        return []
    flags = ["too quick"] if seconds and statistics.median(seconds) < QUICK[kind] else []
    if kind != "rich":
        answers = {json.dumps(row["answer"]) for row in done}
        return [*flags, *(["always the same answer"] if len(answers) == 1 else [])]
    for name in schema.SCORES:
        scores = {row["answer"]["scores"].get(name) for row in done}
        if scores != {None} and len(scores) == 1:
            flags.append(f"always the same {name}")
    marks = [_marks(row["answer"]) for row in done]
    if usual > 0.5 and not any(marks):
        flags.append("marks nothing")
    if usual > 0 and statistics.fmean(marks) > 2 * usual:
        flags.append("marks more than twice as much as usual")
    return flags

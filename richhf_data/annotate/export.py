"""Writes the answers of a project in the formats that the next commands read.

rich          annotations.jsonl, for `richhf_data.consolidate` and `richhf_data.agreement`; annotations_suggested.jsonl has
              the answers of annotators who saw a model's suggestion; label_studio.json if it is asked for
binary        feedback.jsonl, for `rahf.reward.train`: the majority's label of each picture
side_by_side  responses.jsonl, for `rahf.diffusion.evaluate --responses`; the pictures' digests (`images.digest`, of the
              files as they were read) tell which pictures of a prompt a line is about
"""

import collections
import json
import os
import pathlib

from richhf_data import images, jsonl, paths
from richhf_data.annotate import kinds, label_studio
from richhf_data.annotate.overview import skipped
from richhf_data.annotate.store import PICTURES, Store


def export(store: Store, output, picture_url: str | None = None) -> dict[str, int]:
    """Writes the answers that there are now; the same answers give the same files.

    Gold items, late answers and items that most annotators skipped are left out.

    Args:
      picture_url: what precedes a picture's file name in Label Studio; None writes nothing for it.

    Returns:
      name of a file or of what was left out -> how many lines or answers.
    """
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rows, work = store.snapshot()
    items = {row["id"]: row for row in rows}
    left_out = skipped(work)
    usable = [row for row in work if items[row["item"]]["gold"] is None]
    done = [row for row in usable if row["state"] == "done" and row["item"] not in left_out]
    done.sort(key=lambda row: (row["item"], row["name"]))
    counts = {"late": sum(row["state"] == "late" for row in usable), "of skipped items": 0}
    counts["of skipped items"] = sum(row["state"] == "done" and row["item"] in left_out for row in usable)
    write = {"rich": _rich, "binary": _binary, "side_by_side": _side_by_side}[store.settings.kind]
    for name, lines in write(store, items, done, output).items():
        jsonl.write(output / name, lines)
        counts[name] = len(lines)
        if picture_url is not None and name == "annotations.jsonl":
            files = {item["uid"]: json.loads(item["pictures"])[0] for item in items.values()}
            sizes = {uid: images.size(store.folder / PICTURES / file) for uid, file in files.items()}
            tasks = label_studio.to_label_studio(lines, lambda uid: f"{picture_url}{files[uid]}", sizes.get)
            text = json.dumps(tasks, indent=1)
            paths.replace(output / "label_studio.json", text.encode())
            paths.replace(output / "label_studio.xml", label_studio.LABELLING_CONFIG.encode())
    return counts


def _rich(store, items, done, output) -> dict[str, list[dict]]:
    lines: dict[bool, list[dict]] = {False: [], True: []}
    for row in done:
        item = items[row["item"]]
        line = {"uid": item["uid"], "annotator": row["name"], "prompt": item["prompt"]}
        lines[bool(row["suggested"])].append(line | kinds.annotation(json.loads(row["answer"])))
    return {"annotations.jsonl": lines[False]} | ({"annotations_suggested.jsonl": lines[True]} if lines[True] else {})


def _binary(store, items, done, output) -> dict[str, list[dict]]:
    votes = collections.defaultdict(list)
    for row in done:
        votes[row["item"]].append(json.loads(row["answer"])["right"])
    folder, lines = pathlib.Path(os.path.relpath(store.folder / PICTURES, output)), []
    for number, given in votes.items():
        if 2 * sum(given) != len(given):
            item = items[number]
            image = (folder / json.loads(item["pictures"])[0]).as_posix()
            lines.append({"prompt": item["prompt"], "image": image, "label": int(2 * sum(given) > len(given))})
    return {"feedback.jsonl": lines}


def _side_by_side(store, items, done, output) -> dict[str, list[dict]]:
    lines = []
    for row in done:
        item = items[row["item"]]
        order = slice(None, None, -1 if store.swapped(item["id"], row["annotator"]) else 1)
        line = {"prompt": item["prompt"], **dict(zip(("left", "right"), json.loads(item["names"])[order], strict=True))}
        line |= {"response": json.loads(row["answer"])["response"], "annotator": row["name"]}
        if item["digest"]:
            line |= zip(("left_digest", "right_digest"), item["digest"].split()[order], strict=True)
        lines.append(line)
    return {"responses.jsonl": lines}

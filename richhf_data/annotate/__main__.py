"""Collects people's feedback on pictures in their browsers.

  python -m richhf_data.annotate serve  --workdir=DIR --images=GLOB|JSONL|PARQUET [--kind=rich|binary|side_by_side]
  python -m richhf_data.annotate add    --workdir=DIR --images=...      more pictures, also while it serves
  python -m richhf_data.annotate export --workdir=DIR [--output=DIR]    at any time
  python -m richhf_data.annotate choose --images=FILE --output=FILE     which pictures to annotate
  python -m richhf_data.annotate import --label_studio=FILE --output=FILE
  python -m richhf_data.annotate COMMAND --help

Serves on 127.0.0.1, to you alone. With --annotators=ada,bob each of them gets a personal link. Put a server that speaks
https in front of it, and say where people find it: --url=https://feedback.example.org
"""

import contextlib
import json
import pathlib
import signal
import sqlite3
import sys

from absl import flags

from richhf_data import command, consolidate, jsonl, keywords, paths, ranges
from richhf_data.annotate import choose, export, kinds, label_studio, pictures, store
from richhf_data.errors import UserError

_DEFAULT = store.Settings()
_NUMBERS = {
    "wanted": ("Annotators a picture.", ranges.Range(1, 1000, whole=True)),
    "lease_seconds": ("Seconds without a sign of life, until another one gets the picture.", ranges.POSITIVE),
    "gold_every": ("One picture in so many is gold.", ranges.Range(2, 10_000, whole=True)),
    "qualify": ("Gold pictures before the first other one.", ranges.Range(0, 1000, whole=True)),
    "qualify_share": ("The least mean agreement with them.", ranges.SHARE),
}


def _workdir() -> None:
    flags.DEFINE_string("workdir", None, "The project's folder.", required=True)


def _images() -> None:
    flags.DEFINE_multi_string("images", [], "Pictures: a pattern, a .jsonl, a .parquet or a folder; two for side_by_side.")
    flags.DEFINE_list("names", [], "side_by_side: the names of the two sets; those of their folders if not given.")
    flags.DEFINE_string(
        "gold", None, 'A JSONL of answers that are known: annotations, one a picture; {"uid", "right"} if binary.'
    )


def _serve_flags() -> None:
    _workdir()
    _images()
    flags.DEFINE_enum("kind", None, kinds.KINDS, f"What annotators are asked; {_DEFAULT.kind} if not given.")
    flags.DEFINE_list("questions", None, f"rich: some of {', '.join(kinds.QUESTIONS)}; all if not given.")
    flags.DEFINE_string("question", None, f"side_by_side: the question; {_DEFAULT.question!r} if not given.")
    for name, (help_text, numbers) in _NUMBERS.items():
        ranges.flag(name, None, f"{help_text} {getattr(_DEFAULT, name):g} if not given.", numbers)
    flags.DEFINE_bool("suggest", None, "Show the pictures' suggestions; such answers are exported apart.")
    flags.DEFINE_list("annotators", [], "Names; each gets a personal link.")
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on.")
    ranges.flag("port", 8000, "The port; 0 takes a free one.", ranges.Range(0, 65535, whole=True))
    flags.DEFINE_string(
        "url", "", "Where people find it, behind a server of this machine that speaks https and passes it on."
    )


def serve() -> None:
    """Opens or makes the project, and serves until it is stopped."""
    try:
        from richhf_data import web
        from richhf_data.annotate import server
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}; pip install 'rahf[annotate]' installs it") from error
    args = flags.FLAGS
    given = {name: args[name].value for name in ("kind", "question", "suggest", *_NUMBERS) if args[name].value is not None}
    if args.questions:
        given["questions"] = kinds.checked_questions(args.questions)
    workdir, accounts = pathlib.Path(args.workdir), bool(args.annotators)
    reserved = [name for name in args.annotators if name in ("administrator", "local")]
    if reserved or len(set(args.annotators)) != len(args.annotators):
        expected = "different names, none of them administrator or local"
        raise UserError(f"annotators: got {', '.join(args.annotators)}, expected {expected}")
    with contextlib.closing(server.listen(args.host, args.port, accounts)) as bound, paths.locked(workdir):
        is_new = not (workdir / store.FILE).is_file()
        if is_new and not args.images:
            raise UserError("images: got none, expected --images=... for a new project")
        found = {one: pictures.find(one) for one in args.images}  # before a project is made
        if is_new and not accounts:
            given = {"wanted": 1} | given  # there is one annotator
        with contextlib.closing(store.Store(workdir, given)) as project:
            _add(project, found)
            _check(project, len(args.annotators))
            host = f"[{args.host}]" if ":" in args.host else args.host
            address = args.url.rstrip("/") or f"http://{host}:{bound.getsockname()[1]}"
            if accounts:
                for name, administrator in (("administrator", True), *((name, False) for name in args.annotators)):
                    key = project.key(project.invite(name, administrator))
                    print(f"{name:<16} {address}/enter/{key}")
            else:
                print(f"{address}       annotate\n{address}/admin progress")
            print("Ctrl+C stops; the same command goes on.", flush=True)
            application = server.app(project, accounts, args.url, (args.host.strip("[]"), "127.0.0.1", "localhost", "::1"))
            web.run(application, bound, proxy=bool(args.url))


def _check(project: store.Store, annotators: int) -> None:
    """Refuses a project that cannot begin, and warns of one that cannot end."""
    items, settings = project.items(), project.settings
    if not items:
        raise UserError("images: no picture can be annotated; the reasons are above")
    gold = sum(row["gold"] is not None for row in items)
    if settings.qualify > gold:
        raise UserError(f"qualify: got {settings.qualify} with {gold} gold pictures, expected as many; give --gold")
    people = [row for row in project.annotators() if not row["revoked"] and not row["administrator"]]
    if annotators and settings.wanted > len({row["name"] for row in people} | set(flags.FLAGS.annotators)):
        print(f"warning: each picture needs {settings.wanted} annotators; invite more, or lower --wanted", file=sys.stderr)


def add() -> None:
    """Adds pictures to a project."""
    with contextlib.closing(store.Store(flags.FLAGS.workdir)) as project:
        _add(project, {one: pictures.find(one) for one in flags.FLAGS.images})


def _add(project: store.Store, found: dict[str, list[pictures.Source]]) -> None:
    args = flags.FLAGS
    if not args.images:
        return
    if project.settings.kind == "side_by_side":
        names = args.names or [
            pathlib.Path(one).name if pathlib.Path(one).is_dir() else pathlib.Path(one).stem for one in args.images
        ]
        if len(names) != len(args.images) or len(set(names)) != len(names):
            raise UserError(
                f"names: got {', '.join(names)} for {len(args.images)} --images, expected a different one for each"
            )
        added = pictures.add_pairs(project, dict(zip(names, found.values(), strict=True)))
    else:
        gold = _gold(project) if args.gold else None
        added = pictures.add(project, [one for each in found.values() for one in each], gold)
    print(f"{added} new items, {len(project.items())} in all")
    for name, reason in project.refused():
        print(f"left out: {name}: {reason}", file=sys.stderr)


def _gold(project: store.Store) -> dict[str, dict]:
    """uid -> the known answer, from --gold."""
    kind, file = project.settings.kind, flags.FLAGS.gold
    if kind == "binary":
        expected = '{"uid": name, "right": true}'
        rows = jsonl.read(file, "gold", expected, ("uid",))
        return {row["uid"]: kinds.check(kind, (), "", {"right": row.get("right")}) for row in rows}
    if kind != "rich":
        raise UserError(f"gold: got a file for a project of the kind {kind}, expected one of the kind rich or binary")
    found = {}
    for uid, one in consolidate.read(file).items():
        if len(one.annotations) != 1:
            raise UserError(f"gold: got {len(one.annotations)} annotations of {uid!r}, expected one")
        (annotation,) = one.annotations.values()
        value = annotation.to_json()
        words = [place for place, label in enumerate(annotation.labels or ()) if label == keywords.MISALIGNED]
        more = {} if annotation.labels is None else {kinds.WORDS: words}
        found[uid] = {"points": value["points"], "scores": value["scores"]} | more
    return found


def _export_flags() -> None:
    _workdir()
    flags.DEFINE_string("output", None, "The folder to write; DIR/export if not given.")
    flags.DEFINE_bool("label_studio", False, "rich: also write Label Studio's JSON and its labelling config.")
    flags.DEFINE_string("picture_url", "/data/local-files/?d=", "Before a picture's file name, its URL in Label Studio.")


def write() -> None:
    """Exports the answers, and says what reads them."""
    args = flags.FLAGS
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "export")
    with contextlib.closing(store.Store(args.workdir)) as project:
        for name, count in export.export(project, output, args.picture_url if args.label_studio else None).items():
            print(f"{name:<28}{count:>8}")
        folder = project.folder / store.PICTURES
        print({
            "rich": f"python -m richhf_data.consolidate --annotations={output}/annotations.jsonl --images={folder} "
            "--output=DIR",
            "binary": f"python -m rahf.reward.train --feedback={output}/feedback.jsonl --clip=DIR --workdir=DIR",
            "side_by_side": f"python -m rahf.diffusion.evaluate --images=A --images=B --responses={output}/responses.jsonl "
            "--output=DIR",
        }[project.settings.kind])  # fmt: skip


def _import_flags() -> None:
    flags.DEFINE_string("label_studio", None, "A JSON file that Label Studio exported.", required=True)
    flags.DEFINE_string("output", None, "The JSONL file to write.", required=True)
    flags.DEFINE_list("asked", list(label_studio.NOTHING), "What every annotator was asked; without marks it is flawless.")


def read() -> None:
    """Writes what Label Studio exported as annotations for `richhf_data.consolidate`."""
    args = flags.FLAGS
    paths.check_file("label_studio", args.label_studio, "a JSON file")
    text = jsonl.decode(pathlib.Path(args.label_studio).read_bytes(), f"label_studio: {args.label_studio}")
    try:
        tasks = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"label_studio: {args.label_studio} is not JSON ({error}), expected what Label Studio exports"
        ) from error
    lines = label_studio.from_label_studio(tasks, args.asked)
    jsonl.write(args.output, lines)
    print(f"{args.output}: {len(lines)} annotations")


COMMANDS = {
    "serve": (serve, _serve_flags),
    "add": (add, lambda: (_workdir(), _images())),
    "export": (write, _export_flags),
    "choose": (choose.main, choose.define_flags),
    "import": (read, _import_flags),
}


def main() -> None:
    """Runs the command that was named."""
    try:
        COMMANDS[_name][0]()
    except sqlite3.OperationalError as error:
        raise UserError(f"workdir: {store.FILE}: {error}; make room there, or the right to write") from error


def _read_arguments(argv: list[str]) -> list[str]:
    global _name
    _name = argv[1] if len(argv) > 1 else ""
    if _name in COMMANDS:
        COMMANDS[_name][1]()
        return [argv[0], *argv[2:]]
    if command.wants_help(argv):
        print(__doc__)
        raise SystemExit(0)
    raise UserError(f"command: got {_name!r}, expected one of {', '.join(COMMANDS)}")


_name = ""

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C
    command.run(main, _read_arguments)

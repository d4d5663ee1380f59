"""Experiments: configs by name, by file or of a workdir, with overrides from the command line.

    --config=rahf_base                       a config that RAHF comes with
    --config=mine/experiment.py              a file with a function `get_config()`
    --config.optimizer.learning_rate=1e-3    another value for one key; an unknown key is refused
"""

import difflib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import flax.traverse_util
import ml_collections
from absl import flags
from ml_collections import config_flags

from rahf import folders
from richhf_data import command, ranges
from richhf_data.errors import UserError, in_code_of_the_user

FOLDER = pathlib.Path(__file__).parent / "configs"  # of the wheel
FOLDER = FOLDER if FOLDER.is_dir() else FOLDER.parents[1] / "configs"  # of a checkout
HELP = "The experiment: a name of RAHF's configs or a file. --config.KEY=VALUE overrides a value."


def names() -> list[str]:
    """The configs that RAHF comes with."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name: str) -> ml_collections.ConfigDict:
    """The config of a name or of a file.

    Raises:
      UserError: there is no such config, or the file has no `get_config`.
    """
    path = FOLDER / f"{name}.py" if name in names() else pathlib.Path(name)
    if not path.is_file():
        raise UserError(f"config: no config {name!r}{_hint(name, names())}, or the path of a file with get_config()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with in_code_of_the_user(f"config: {path}"):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config: {path} has no function get_config(), expected one that returns a ConfigDict")
    with in_code_of_the_user(f"config: {path}"):
        config = module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config: {path}: get_config() returned a {type(config).__name__}, expected a ConfigDict")
    return config


def reader(
    *,
    kinds: Sequence[str] = (),
    default: str | None = None,
    of_workdir: Callable | None = None,
    required: bool = True,
) -> Callable[[list[str]], list[str]]:
    """For `command.run`: defines the flag --config and its overrides.

    Args:
      kinds: of configs that the command takes (key `kind`; without it, "rahf"); all by default.
      default: the config that is used if --config is not given.
      of_workdir: workdir -> its config, which is used if --config is not given. An address of a folder that rahf.convert
        wrote is replaced by a local folder (folders.py).
      required: whether there must be a config.
    """

    def read_arguments(argv):
        name, rest = _taken(argv, "config")
        workdir, others = _taken(rest, "workdir")
        if of_workdir and workdir and (local := folders.local_folder(workdir)) != workdir:
            workdir, rest = local, [*others, f"--workdir={local}"]
        overrides = [match[1] for argument in rest if (match := re.match(r"--?(?:no)?config\.([^=]+)", argument))]
        if name or default:
            config = load(name or default)
        elif of_workdir and workdir:
            config = of_workdir(workdir)
        elif overrides or (required and not command.wants_help(argv)):
            if of_workdir:
                raise UserError("--workdir: got none, expected --workdir=DIR, whose config is used")
            raise UserError(f"--config: got none, expected --config=NAME, one of {', '.join(names())}, or of a file")
        else:
            flags.DEFINE_string("config", None, HELP)
            return rest
        if kinds and (kind := config.get("kind", "rahf")) not in kinds:
            raise UserError(f"--config: {name or default} is of the kind {kind!r}, expected one of {', '.join(kinds)}")
        for key in overrides:
            check_key(config, key)
        config_flags.DEFINE_config_dict("config", config, HELP, sys_argv=rest)
        return rest

    return read_arguments


def check_key(config: ml_collections.ConfigDict, key: str) -> None:
    """Refuses a key such as `optimizer.learning_rate` that a config does not have: UserError with the nearest one."""
    node, done = config, []
    for part in key.split("."):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            where = ".".join(["--config", *done, part])
            raise UserError(f"{where}: the config has no such key{_hint(part, known)}")
        node, done = node[part], [*done, part]


def check_ranges(config: ml_collections.ConfigDict, allowed: Mapping[str, ranges.Values], section: str = "") -> None:
    """Refuses a value that is missing or out of its range: UserError that names its key.

    Args:
      allowed: key -> the values that it takes. A key `SECTION.*` stands for all keys of a section, if there are any.
      section: where the config lies in the command's own, for the error; such as "base.".
    """
    values = flax.traverse_util.flatten_dict(config.to_dict(), sep=".")
    for key, expected in allowed.items():
        names = [name for name in values if name.startswith(key[:-1])] if key.endswith("*") else [key]
        for name in names:
            if name not in values:
                raise UserError(f"{section}{name}: got none, expected {expected}; the config lacks this key")
            if values[name] not in expected:
                raise UserError(f"{section}{name}: got {values[name]!r}, expected {expected}")


def _hint(name: str, known: list[str]) -> str:
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]!r}?"
    return f", expected one of {', '.join(known)}" if known else ""


def _taken(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of a flag, and the arguments without it."""
    value, rest, waiting = None, [], False
    for argument in argv:
        if waiting:
            value, waiting = argument, False
        elif match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL):
            value, waiting = match[1], match[1] is None
        else:
            rest.append(argument)
    return value, rest

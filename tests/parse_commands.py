"""Runs commands as far as their flags parse: `test_docs.py` starts this once for all commands of the documentation.

Reads [[module or file, argument, ...], ...] as JSON from the input; prints the commands' errors, null for none, as JSON. All
run in one process, so that each library is imported once: a command's module runs as `__main__` with the argument parsers
replaced by ones that end the command, and its flags are taken away afterwards.
"""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import runpy
import sys
import types
import warnings

from absl import app, flags

from rahf import experiments
from richhf_data import command

OPTIONAL = ("torch", "diffusers", "open_clip", "xmanager")  # imported by commands, but not needed to parse their flags
PARSE_ARGS = argparse.ArgumentParser.parse_args


class Parsed(BaseException):
    """The flags of a command are right."""


class Anything(type):
    """Classes that have every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Stub(types.ModuleType):
    """Stands for a module that is not installed."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        return getattr(Anything("Anything", (), {}), name)


def run(main, read_arguments=list):
    """In place of `command.run`."""
    command._parse(read_arguments, sys.argv)
    raise Parsed


def run_app(main, **kwargs):
    """In place of `absl.app.run`. The config keys of a sweep are checked as well."""
    if len(left := flags.FLAGS(sys.argv)) > 1:
        raise ValueError(f"unexpected arguments {left[1:]}")
    for sweep in getattr(flags.FLAGS, "sweep", []):
        experiments.check_key(flags.FLAGS.config, sweep.partition("=")[0])
    raise Parsed


def parse_args(parser, argv=None, namespace=None):
    """In place of `argparse.ArgumentParser.parse_args`."""
    PARSE_ARGS(parser, argv, namespace)
    raise Parsed


def error_of(target: str, arguments: list[str]) -> str | None:
    """What is wrong with the flags of a command; None if nothing is."""
    before = set(flags.FLAGS)
    sys.argv = [target, *arguments]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            if target.endswith(".py"):
                runpy.run_path(target, run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        return "parsed no flags"
    except Parsed:
        return None
    except (Exception, SystemExit) as error:
        return f"{output.getvalue()}{type(error).__name__}: {error}"
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def main():
    """Reads, runs, prints."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    sys.modules |= {name: Stub(name) for name in OPTIONAL if importlib.util.find_spec(name) is None}
    command.run, app.run = run, run_app
    argparse.ArgumentParser.parse_args = parse_args
    print(json.dumps([error_of(target, arguments) for target, *arguments in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()

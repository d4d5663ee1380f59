"""Which numbers an option takes: the same definition for the keys of configs and for the flags of commands.

    RANGES = {"train.batch_size": ranges.ROWS, "train.text_dropout": ranges.Range(0, 1, without=(1,))}
    ranges.flag("batch_size", 32, "Images at a time.", ranges.ROWS)
"""

import argparse
import dataclasses
import numbers

import numpy as np
from absl import flags

flags.disclaim_key_flags()  # a flag is its caller's


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers between two bounds. `value in range` is False for nan and infinity, and for what is no number.

    Attributes:
      least, most: the bounds, which are in the range unless `without` has them.
      whole: integers alone. Other numbers are compared as float32, as they are computed with.
      also: one more value that is taken.
    """

    least: float
    most: float
    without: tuple[float, ...] = ()
    whole: bool = False
    also: float | None = None

    def __contains__(self, value) -> bool:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.whole else numbers.Real):
            return False
        if not self.whole:
            with np.errstate(over="ignore"):
                try:
                    value = np.float32(float(value))
                except OverflowError:  # an integer beyond float64
                    return False
        inside = self.least <= value <= self.most and value not in self.without
        return inside or (self.also is not None and bool(value == self.also))

    def __str__(self):
        also = "" if self.also is None else f", or {self.also}"
        return f"{'a whole number' if self.whole else 'a number'} {self.bounds()}{also}"

    def bounds(self) -> str:
        """The bounds in words: "from 1 to 256"."""
        least, most = (
            f"{bound:,.0f}" if bound == round(bound) and abs(bound) < 1e15 else f"{bound:g}"
            for bound in (self.least, self.most)
        )
        if not self.without:
            return f"from {least} to {most}"
        lower = f"above {least}" if self.least in self.without else f"of {least} or more"
        return f"{lower} and {'below' if self.most in self.without else 'at most'} {most}"


@dataclasses.dataclass(frozen=True)
class Each:
    """Sequences of one number or more, each in a range."""

    range: Range

    def __contains__(self, value) -> bool:
        return isinstance(value, list | tuple) and len(value) > 0 and all(entry in self.range for entry in value)

    def __str__(self):
        return f"one or more, each {self.range}"


class OneOf(tuple):
    """The texts that an option takes."""

    def __str__(self):
        return f"one of {', '.join(self)}"


Values = Range | Each | OneOf
COUNT = Range(1, 2**31 - 1, whole=True)
NUMBER = Range(0, 2**31 - 1, whole=True)
ROWS = Range(1, 2**20, whole=True)  # of a batch
PROCESSES = Range(1, 1024, whole=True)
NUMBER_OF_PROCESSES = Range(0, 1024, whole=True)
SEED = Range(0, 2**32 - 1, whole=True)  # JAX takes a larger one modulo 2**32
LENGTH = Range(1, 2**14, whole=True)  # of a text, in ids
PIXELS = Range(1, 2**14, whole=True)  # of a side
SHARE = Range(0, 1)
SOME_SHARE = Range(0, 1, without=(0,))
RATE = Range(0, 1, without=(1,))  # of dropout, of a moving average
WEIGHT = Range(0, 1e6)
POSITIVE = Range(0, 1e6, without=(0,))
HOLDOUT = Range(0, 0.45)  # of dev, and of test: both leave a tenth to train
GUIDANCE = Range(0, 1000)


def flag(name: str, default: float | None, text: str, allowed: Range) -> flags.FlagHolder:
    """Defines a flag whose value lies in a range. A command refuses another one: exit code 2, and a line that names both."""
    return flags.DEFINE(_Parser(allowed), name, default, text, serializer=flags.ArgumentSerializer())


def argument(allowed: Range):
    """Of a range, the `type` of an argument of argparse."""

    def parse(text):
        try:
            return _Parser(allowed).parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"got {text}, {error}") from error

    return parse


class _Parser(flags.ArgumentParser):
    def __init__(self, allowed: Range):
        self.allowed, self.syntactic_help = allowed, str(allowed)
        self._parser = flags.IntegerParser() if allowed.whole else flags.FloatParser()

    def parse(self, argument):
        try:
            value = self._parser.convert(argument)
        except (TypeError, ValueError, OverflowError):
            value = None
        if value not in self.allowed:
            raise ValueError(f"expected {self.allowed}")
        return value

    def flag_type(self):
        return self._parser.flag_type()

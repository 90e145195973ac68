"""Parsers for rl_zoo3's command lines, with one-line errors, the defaults of this package, and numbers such as 1e5."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any

import torch as th
import yaml
from rl_zoo3 import utils

DEFAULT_ALGORITHM = "dual_clip_ppo"
LOG_FOLDER = "logs"

# Flags that take a number of at least one.
_COUNTS = {"--n-timesteps", "--eval-episodes", "--n-eval-envs", "--n-envs", "--n-jobs", "--n-trials"}

_INIT = argparse.ArgumentParser.__init__


@contextlib.contextmanager
def own_parsers() -> Iterator[None]:
    """Every parser created in the ``with`` block becomes a :class:`Parser`, until the first one reads its arguments."""
    before = argparse.ArgumentParser.__init__

    def init(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        if type(self) is argparse.ArgumentParser:
            self.__class__ = Parser
            self.prog = sys.argv[0]  # `sb3-ppo-ext train`; rl_zoo3's plots put a sentence here

    argparse.ArgumentParser.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.__init__ = before  # type: ignore[method-assign]


class Parser(argparse.ArgumentParser):
    """A parser that gives rl_zoo3's arguments the types and defaults of this package, and has one-line errors."""

    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        """As :meth:`argparse.ArgumentParser.add_argument`, with changes to some of rl_zoo3's arguments."""
        if "--algo" in flags and "choices" in options:
            options["type"] = partial(_algorithm, known=options["choices"])
            if options.get("default") == "ppo":
                options.update(default=None, help=f"RL algorithm; default: {DEFAULT_ALGORITHM}")
        elif options.get("type") is int:
            options["type"] = partial(whole_number, minimum=1) if _COUNTS & set(flags) else whole_number
            if "--seed" in flags:
                options["type"] = seed_number
        elif str(options.get("default")).rstrip("/") == "rl-trained-agents":  # a folder of rl_zoo3's repository
            options["default"] = LOG_FOLDER
        elif options.get("action") is utils.StoreDict:
            options["action"] = StoreDict
        return super().add_argument(*flags, **options)

    def parse_args(self, *arguments: Any, **options: Any) -> argparse.Namespace:  # type: ignore[override]
        """As :meth:`argparse.ArgumentParser.parse_args`; prints choices that were made for the user."""
        argparse.ArgumentParser.__init__ = _INIT  # type: ignore[method-assign]  # later parsers are not rl_zoo3's
        parsed: argparse.Namespace = super().parse_args(*arguments, **options)
        if "algo" in parsed and parsed.algo is None:
            parsed.algo = DEFAULT_ALGORITHM
            print(f"{self.prog}: no --algo was given, so {DEFAULT_ALGORITHM} is used")
        device = str(getattr(parsed, "device", ""))
        if device.startswith("cuda") and not th.cuda.is_available():
            parsed.device = "cpu"
            print(f"{self.prog}: --device {device}: torch finds no CUDA device here, so the CPU is used")
        return parsed

    def error(self, message: str) -> Any:
        """End the program with this message, without the sixty lines of rl_zoo3's usage that would hide it."""
        self.exit(2, f"{self.prog}: {message}\n")


class StoreDict(utils.StoreDict):
    """``key:value`` pairs; a value is read as Python, as in rl_zoo3, or else as YAML (``lin_0.3``, ``true``)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """As :meth:`argparse.Action.__call__`; a second flag adds to the pairs of the first."""
        given: dict[str, Any] = dict(getattr(namespace, self.dest) or {})
        for text in values:
            key, colon, value = text.partition(":")
            assigned, equals, assigned_value = text.partition("=")
            if equals and assigned.isidentifier():
                raise argparse.ArgumentError(self, f"{text!r} must be written {assigned}:{assigned_value}")
            if not (colon and key and value):
                raise argparse.ArgumentError(self, f"{text!r} is not a pair key:value, such as gamma:0.9")
            given[key] = self._evaluate(parser, text, value)
        setattr(namespace, self.dest, given)

    def _evaluate(self, parser: argparse.ArgumentParser, text: str, value: str) -> Any:
        read = argparse.Namespace()
        try:
            super().__call__(parser, read, [f"value:{value}"])  # type: ignore[no-untyped-call]
            return getattr(read, self.dest)["value"]
        except Exception as error:  # evaluating invalid Python may raise anything
            if "(" not in value:  # a call is not meant as YAML
                try:
                    return yaml.safe_load(value)
                except yaml.YAMLError:
                    pass
            reason = f"{type(error).__name__}: {error}"
            raise argparse.ArgumentError(self, f"{text!r} has a value that cannot be read ({reason})") from None


def whole_number(text: object, minimum: float = -math.inf) -> int:
    """
    :param text: a number as the user wrote it: 100000, 1e5, 100_000
    :param minimum: the smallest number that is allowed
    :return: the number
    :raises argparse.ArgumentTypeError: if the text is not a whole number, or the number is too small
    """
    try:
        number = Decimal(str(text))  # reads all of these formats exactly
    except InvalidOperation:
        number = Decimal("nan")
    if not (number.is_finite() and abs(number) < 1e18 and number == int(number) and number >= minimum):
        least = "" if minimum == -math.inf else f" of at least {minimum}"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be a whole number{least}, such as 1000 or 1e3"
        )
    return int(number)


def seed_number(text: str, minimum: float = -math.inf) -> int:
    """
    :param text: a seed as the user wrote it
    :param minimum: the smallest seed that is allowed; if a seed is below 0, rl_zoo3 draws a random one
    :return: the seed
    :raises argparse.ArgumentTypeError: if the text is not a whole number, or out of range
    """
    seed = whole_number(text, minimum)
    if seed >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be below 2**32")
    return seed


def nearest(name: str, known: Sequence[str]) -> str:
    """
    :param name: an unknown name
    :param known: all known names
    :return: the end of a message, which gives the nearest known name
    """
    return "".join(f"; the nearest is '{match}'" for match in difflib.get_close_matches(name, known, 1, cutoff=0.0))


def _algorithm(name: str, known: Sequence[str]) -> str:
    """
    :param name: name of an algorithm, as the user wrote it
    :param known: keys of algorithms
    :return: the name
    :raises argparse.ArgumentTypeError: if the name is not a known key
    """
    if name in known:
        return name
    classes: Mapping[str, type] = utils.ALGOS
    plain = _plain(name)
    meant = [key for key in known if plain in (_plain(key), _plain(classes[key].__name__))]
    meant = meant or difflib.get_close_matches(name.lower(), known, 1, cutoff=0.0)
    raise argparse.ArgumentTypeError(f"there is no '{name}'; did you mean {' or '.join(map(repr, meant))}?")


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())

"""How arguments are grouped in a verb's help, and how a mistake is told."""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says one line per mistake, without the usage text in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dotresize: {message} (see {self.prog} --help)\n")


class Groups(defaultdict):
    """The groups of a verb's options, each made when it is first asked for."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self._parser = parser

    def __missing__(self, title: str) -> argparse._ArgumentGroup:
        self[title] = group = self._parser.add_argument_group(title)
        return group

"""Runs commands in this process, each only once, on directories that hold nothing but a config."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from spdcompile.cli import main
from tests.models import tiny

NUM_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Family -> path of a directory with the config.json of a tiny model of three layers."""

    @cache
    def save(family: str) -> str:
        directory = tmp_path_factory.mktemp(family)
        tiny(family, layers=NUM_LAYERS).config.save_pretrained(directory)
        return str(directory)

    return save


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs a command line; the same one twice is run once."""

    @cache
    def run(*argv: str) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(argv)
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def trace(command: Command, config_of: Callable[[str], str]) -> Command:
    """Runs `trace-and-report` on a family at tp 4."""

    def run(family: str, *options: str) -> Outcome:
        return command("trace-and-report", config_of(family), "--tp", "4", *options)

    return run


@pytest.fixture
def make_directory(tmp_path: Path) -> Callable[..., str]:
    """Makes a directory of files: name -> text."""

    def make(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return str(tmp_path)

    return make

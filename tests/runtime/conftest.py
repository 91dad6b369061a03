"""Fixtures of the tests of the runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def reproducible() -> None:
    """The same random numbers in every test, and nothing compiled before it."""
    torch.manual_seed(7)
    torch.compiler.reset()


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the runtime said, whatever other tests did to its logger."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("spdcompile.runtime")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)

"""Fixtures of the tests of the runtime."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def reproducible() -> None:
    """The same random numbers in every test, and nothing compiled before it."""
    torch.manual_seed(7)
    torch.compiler.reset()

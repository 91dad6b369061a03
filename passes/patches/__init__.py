"""What is changed in a model's code while it is exported, so that one graph can hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def patched_for_export(model: PreTrainedModel) -> Iterator[None]:
    yield

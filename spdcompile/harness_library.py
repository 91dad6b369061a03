"""Where lm-evaluation-harness is missing, and what it prints: without importing it, for seconds."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from spdcompile.errors import UsageError

INSTALL = "pip install 'spdcompile[eval]'"


def missing_error(found: str = "no library `lm_eval` with its Hugging Face part") -> UsageError:
    """Says what to install."""
    return UsageError(
        "lm-evaluation-harness is not installed.",
        where="tasks",
        found=found,
        needed="lm_eval with what it needs for Hugging Face models",
        fix=INSTALL,
    )


@contextmanager
def quietly(progress: bool) -> Iterator[None]:
    """Keeps what the harness prints out of stdout; and out of stderr, unless it shows progress."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    with ExitStack() as stack:
        stack.callback(logger.setLevel, before)
        logger.setLevel(logging.ERROR)
        if not progress:
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(silent))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield

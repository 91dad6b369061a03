"""Keeps what transformers says of itself out of a command's output."""

from __future__ import annotations

import transformers


def quiet_transformers() -> None:
    """Errors only, and no progress bars, for the rest of the process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

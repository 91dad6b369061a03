"""What is changed in a model's code while it is exported, so that one graph can hold it."""

from __future__ import annotations

from spdcompile.passes.patches.apply import patched_for_export

__all__ = ["patched_for_export"]

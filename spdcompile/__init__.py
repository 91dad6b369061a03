"""Tensor-parallel compiler for Hugging Face causal LMs with Sync-Point Drop."""

from __future__ import annotations

__version__ = "0.1.0"

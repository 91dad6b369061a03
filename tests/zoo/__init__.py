"""Every causal LM that transformers maps, tiny and random, measured against the unsharded model.

`python -m tests.zoo` runs it; `make zoo` writes docs/architectures.md from what comes out.
"""

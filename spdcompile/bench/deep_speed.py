"""A model split by DeepSpeed's AutoTP."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spdcompile.bench.hugging_face import load


def load_split(directory: Path, dtype: torch.dtype, tp: int) -> PreTrainedModel:
    """The model with its linear layers split and summed by DeepSpeed's own operator.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    import deepspeed  # not above: it is no dependency, and imports much

    # Set by DeepSpeed's own launcher; without it the operator has no memory, and the process dies.
    os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    engine = deepspeed.init_inference(
        load(directory, dtype),
        dtype=dtype,
        tensor_parallel={"tp_size": tp},
        replace_with_kernel_inject=False,
    )
    return engine.module

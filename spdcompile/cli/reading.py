"""What commands read besides the model: its tokenizer, and the calibration text."""

from __future__ import annotations

import argparse
import os

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spdcompile.errors import UsageError
from spdcompile.runtime.texts import calibration_tokens


def read_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights.

    Raises:
        UsageError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            "The tokenizer cannot be read.",
            where=os.path.join(directory, "tokenizer.json"),
            found=str(error).splitlines()[0],
            needed="a tokenizer beside the weights",
        ) from error


def read_tokens(arguments: argparse.Namespace, model: PreTrainedModel) -> Tensor:
    """The chunks that `text_options` describe, int64 [chunks, length].

    Raises:
        UsageError: the text is not there, or cannot be cut like that.
    """
    return calibration_tokens(
        arguments.text,
        read_tokenizer(arguments.model),
        length=arguments.length,
        count=arguments.count,
        max_length=getattr(model.config, "max_position_embeddings", None),
    )

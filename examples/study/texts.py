"""Texts of different kinds, all of them at hand wherever Python is."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from examples.study.context import Context

CALIBRATION = "calibration text"


def texts_of(context: Context) -> dict[str, Tensor]:
    """Kind of text -> chunks, int64 [chunks, length], equally many of each."""
    count = context.sizes.scoring
    return {
        CALIBRATION: context.chunks(context.calibration_text, count),
        "Python source": context.chunks(python_source(), count),
        "Python manual": context.chunks("\n".join(topics.values()), count),
        "the model's own": own_text(context, count),
    }


def python_source() -> str:
    """A few modules of the standard library that is running (PSF licence), read where it is."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ["argparse", "ast", "datetime", "decimal", "difflib", "inspect", "tarfile", "zipfile"]
    found = [library / f"{name}.py" for name in names]
    texts = [path.read_text(encoding="utf-8") for path in found if path.exists()]
    return "\n".join(texts)


@torch.no_grad()
def own_text(context: Context, count: int) -> Tensor:
    """What the model writes by itself, sampled at temperature 1 from nothing but its begin token.

    Returns: int64 [count, length].
    """
    model, length = context.model, context.sizes.length
    begin = torch.full((count, 1), model.config.bos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"max_new_tokens": length - 1, "min_new_tokens": length - 1, "top_k": 0}
        mask = torch.ones_like(begin)
        return model.generate(begin, attention_mask=mask, do_sample=True, **settings)

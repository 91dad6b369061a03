"""The zoo's data, and tiny random models made from it.

configs.json holds `configs`, an entry (a model type, or a variant of it behind an @) -> the
settings that differ from the type's defaults; and `without`, a model type -> why it has none.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DATA = Path(__file__).with_name("configs.json")
PAD_ID = 0
FIRST_PLAIN_ID = 3  # below it lie the ids for padding, begin and end
WEIGHT_STD = 0.12  # about hidden ** -0.5: logits and attention scores of std about 1
VECTOR_STD = 0.2


@cache
def _data() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def model_type(entry: str) -> str:
    """The model type of an entry: "falcon" of "falcon@alibi"."""
    return entry.partition("@")[0]


def mapped_types() -> Mapping[str, str]:
    """transformers' own causal LMs: model type -> class name."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def reasons_without() -> Mapping[str, str]:
    """Model types that have no config here -> why."""
    return _data()["without"]


def entries() -> list[str]:
    """The entries that the installed transformers knows, in alphabetical order."""
    known = set(mapped_types()) & set(CONFIG_MAPPING_NAMES)
    return sorted(entry for entry in _data()["configs"] if model_type(entry) in known)


def uncovered_types() -> list[str]:
    """Mapped model types that have neither a config nor a reason."""
    covered = {model_type(entry) for entry in _data()["configs"]} | set(reasons_without())
    return sorted(set(mapped_types()) - covered)


def build(entry: str) -> PreTrainedModel:
    """A tiny model in eval mode and float32, the same one each time.

    Raises:
        KeyError: no such entry.
    """
    settings = copy.deepcopy(dict(_data()["configs"][entry]))
    config = AutoConfig.for_model(model_type(entry), **settings)
    with torch.random.fork_rng(devices=[]):  # some constants are drawn from the global generator
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(0))
    return model.eval()


def token_ids(shape: tuple[int, int], vocab: int) -> Tensor:
    """Random ids, int64 [batch, length], without those for padding, begin and end."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_PLAIN_ID, vocab, shape, generator=generator)


def left_padded(ids: Tensor, pads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask, both int64 [batch, length], with `pads[row]` tokens made padding."""
    starts = torch.tensor(pads)[:, None]
    mask = (torch.arange(ids.shape[1])[None] >= starts).to(ids.dtype)
    return ids.masked_fill(mask == 0, PAD_ID), mask


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrites matrices and moves vectors off their initial value, ties kept.

    A vector that stays at zero or one hides that it was added twice or belongs to another head.
    What is zero throughout is drawn anew; what is not, such as a norm weight or a decay,
    varies around its initial value. The same goes for buffers of the checkpoint, such as the
    correction bias of a router.
    """
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(WEIGHT_STD * noise)
        else:
            parameter.add_(VECTOR_STD * noise)
    for buffer in _checkpoint_buffers(model):
        noise = torch.randn(buffer.shape, generator=generator)
        if buffer.is_floating_point() and not bool(buffer.any()):
            buffer.copy_(VECTOR_STD * noise)


def _checkpoint_buffers(model: PreTrainedModel) -> list[Tensor]:
    names = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in names]

"""How a model makes position ids when it is given none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spdcompile.errors import CaptureError
from spdcompile.passes._torch import FakeTensorMode, TorchDispatchMode, pytree
from spdcompile.passes.base import Positions
from spdcompile.passes.export import failure

aten = torch.ops.aten


class _StopProbeError(Exception):
    """Raised at the first decoder layer: what the probe wants to see lies before it."""


_LOOKUPS = {aten.embedding.default, aten.cos.default, aten.sin.default, aten.polar.default}


class _Counting(TorchDispatchMode):
    """Follows tensors through the operators, to see which are counted to number the tokens.

    Args:
        sources: the tensors to follow, by name.
    """

    def __init__(self, **sources: Tensor) -> None:
        super().__init__()
        self._followed = [(tensor, name, False) for name, tensor in sources.items()]
        self.counted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        for tensor, name, is_count in list(self._followed):
            if any(leaf is tensor for leaf in leaves):
                counts = is_count or func is aten.cumsum.default
                self._followed += [(result, name, counts) for result in pytree.tree_leaves(out)]
                if counts and func in _LOOKUPS:
                    self.counted.add(name)
        return out


def default_positions_of(model: PreTrainedModel, layers: nn.ModuleList) -> Positions | None:
    """How the model numbers the tokens when it is called with ids and a mask alone.

    OPT and its relatives count the attended tokens; RoBERTa's count the ids that are no padding;
    the others count from 0, padding or not. Found by running the model, on tensors without data,
    up to its first decoder layer.

    Returns: None if the model takes no position ids.

    Raises:
        CaptureError: the model cannot be run that far without data.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    named = chain(model.named_parameters(), model.named_buffers())
    # Fake tensors rather than meta ones: models know them, and ask no data of them.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        mask = torch.ones((1, 5), dtype=torch.long)
        ids = torch.ones_like(mask)
        tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in named}
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    counting = _Counting(mask=mask, ids=ids)
    try:
        with _stopping_at(layers[0]), fake, counting, torch.no_grad():
            torch.func.functional_call(model, tensors, kwargs=call)
    except _StopProbeError:
        if "ids" in counting.counted:
            return Positions.FROM_IDS
        return Positions.FROM_MASK if "mask" in counting.counted else Positions.ARANGE
    except Exception as error:
        raise CaptureError(
            "Cannot tell how the model numbers its tokens.",
            where=type(model).__name__,
            found=failure(error),
            needed="a forward pass that runs without data up to the first decoder layer",
        ) from error
    raise CaptureError(
        "Cannot tell how the model numbers its tokens.",
        where=type(model).__name__,
        found="a forward pass that never reaches its first decoder layer",
        needed="decoder layers that are called as modules",
    )


@contextmanager
def _stopping_at(layer: nn.Module) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _StopProbeError

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()

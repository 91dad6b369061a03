"""A compiled model as a language model of lm-evaluation-harness.

What a request means - how it is encoded, cut to the model's length, batched, scored, and where text
stops - is left to the harness' own class for Hugging Face models, so that scores compare with
published ones; what runs is the compiled model, with the requests shared out over its replicas.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.harness_library import missing_error, quietly


class Missing:
    """Stands for a class of the harness where that is not installed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise missing_error()


try:
    _huggingface = importlib.import_module("lm_eval.models.huggingface")
    HFLM: Any = _huggingface.HFLM
except ImportError:
    HFLM = Missing


class HarnessLM(HFLM):
    """A compiled model for `lm_eval.simple_evaluate`.

    Greedy unless a task says otherwise. A prompt that is too long is cut from the left, as the
    harness does it; `num_cut` counts that. Under torchrun every process calls it alike and has all
    answers; for the harness each is the only one.

    Args:
        compiled: what runs.
        tokenizer: the model's.
        batch_size: requests at a time.
        max_length: the most tokens of a request, prompt and new ones; that of the model if None.
        progress: whether the harness may show its bars.

    Raises:
        UsageError: lm_eval is not installed.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: bool = True,
    ) -> None:
        with quietly(progress):
            super().__init__(
                _Callable(compiled),
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
            )
        self.compiled, self.num_cut, self._cut_here = compiled, 0, 0
        limits = (self.max_length, compiled.program.max_length)
        self._max_length = min(limit for limit in limits if limit is not None)
        self._quiet = not progress or (dist.is_initialized() and dist.get_rank() != 0)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-likelihood, and whether it is the greedy text.

        Raises:
            UsageError: a continuation is longer than the model's longest input.
        """
        return self._shared(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that do not overlap."""
        return self._shared(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of a request's stop texts, which is left out.

        Raises:
            UsageError: a request leaves no room for its prompt.
        """
        for request in requests:
            settings = _huggingface.normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            self._check_room(settings["max_gen_toks"])
        return self._shared(super().generate_until, requests, disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 [B, S], padded; counts what is cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        if left_truncate_len is not None:
            self._cut_here += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        missing = max(0, self.compiled.program.min_length - ids.shape[1])
        ids = F.pad(ids, (missing, 0), value=self.tokenizer.pad_token_id)
        return ids, F.pad(mask, (missing, 0))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = self.max_length
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= longest:
                raise UsageError(
                    "A continuation cannot be scored.",
                    where="loglikelihood",
                    found=f"{len(continuation)} tokens",
                    needed=f"1 to {longest}, the model's longest input",
                )
            self._cut_here += len(context) + len(continuation) > longest + 1
        quiet = disable_tqdm or self._quiet
        return super()._loglikelihood_tokens(requests, quiet, override_bs)

    def _check_room(self, num_new: int) -> None:
        if num_new >= self.max_length:
            raise UsageError(
                "There is no room for a prompt.",
                where="generate_until",
                found=f"max_gen_toks {num_new}",
                needed=f"fewer than {self.max_length}, the model's longest input",
                fix="set max_gen_toks in the task's generation_kwargs",
            )

    def _shared(self, answer: Callable[..., list[Any]], requests: list[Any], quiet: bool) -> Any:
        """Each replica answers its share, in batches of its own; every process has all answers."""
        number = self.compiled.num_replicas
        shares = [requests[replica::number] for replica in range(number)]

        def run(share: Sequence[Any]) -> tuple[list[Any], int]:
            before = self._cut_here
            answers = answer(share, disable_tqdm=quiet or self._quiet) if share else []
            return answers, self._cut_here - before

        found = self.compiled.over_replicas(run, shares)
        self.num_cut += sum(cut for _, cut in found)
        answers = [answers for answers, _ in found]
        return [answers[place % number][place // number] for place in range(len(requests))]


def reference_lm(
    model: PreTrainedModel | CompiledModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Any:
    """The harness' language model for what a compiled one is compared with."""
    if isinstance(model, CompiledModel):
        return HarnessLM(model, tokenizer, batch_size=batch_size, progress=progress)
    with quietly(progress):
        return HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)


class _Callable:
    """What the harness asks of a model of transformers'."""

    def __init__(self, compiled: CompiledModel) -> None:
        self._compiled, self.config = compiled, compiled.config
        self.device = compiled.executor.device
        self.generate = compiled.generate

    def __call__(self, ids: Tensor) -> Any:
        """The logits of tokens that are padded on the right, if at all: none sees a later one."""
        missing = max(0, self._compiled.program.min_length - ids.shape[1])
        output = self._compiled(F.pad(ids, (0, missing)))
        output.logits = output.logits[:, : ids.shape[1]]
        return output

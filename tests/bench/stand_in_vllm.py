"""As much of vLLM's interface as the benchmark uses, with logits that show which tokens it ran."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VOCABULARY = 32
SECONDS = 0.05


class AdapterLogitsProcessor:
    def __init__(self, *_: Any) -> None: ...

    def new_req_logits_processor(self, params: SamplingParams) -> Any: ...


@dataclass
class TokensPrompt:
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    extra_args: dict[str, Any]


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)


class LLM:
    def __init__(
        self, model: str, logits_processors: list[type[AdapterLogitsProcessor]], **_: Any
    ) -> None:
        if model == "refused":
            raise ValueError("no such\nmodel")
        if model == "deadly":
            os._exit(3)
        assert os.environ["OMP_NUM_THREADS"] == "5"
        dist.init_process_group("gloo")  # its own, and not that of the rank that started it
        self.llm_engine = Engine(logits_processors[0]())


class Engine:
    def __init__(self, processor: AdapterLogitsProcessor) -> None:
        self.processor = processor
        self.requests: dict[str, Request] = {}

    def add_request(self, name: str, prompt: TokensPrompt, params: SamplingParams) -> None:
        assert name not in self.requests
        self.requests[name] = Request(prompt.prompt_token_ids, params)

    def step(self) -> None:
        time.sleep(SECONDS)
        for name, request in reversed([*self.requests.items()]):
            logits = logits_of([*request.prompt, *request.output])
            chosen = self.processor.new_req_logits_processor(request.params)
            request.output.append(int(chosen(request.output, logits).argmax()))
            if len(request.output) == request.params.max_tokens:
                del self.requests[name]


def logits_of(tokens: list[int]) -> Tensor:
    """Largest at the last token, and dependent on all of them and on their order."""
    weighted = sum(place * token for place, token in enumerate(tokens, start=1))
    return torch.eye(VOCABULARY)[tokens[-1]] * weighted

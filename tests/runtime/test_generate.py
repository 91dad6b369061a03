"""Text of a compiled model against that of the model itself, by the same generation code."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import spdcompile
from spdcompile.errors import UsageError
from spdcompile.passes.ops import ATTEND, ATTEND_CACHED
from spdcompile.plan import Plan
from spdcompile.runtime.cache import KVCache
from tests.compare import rel_err
from tests.zoo.models import build, entries, left_padded, token_ids

NUM_NEW = 64
PROMPT = (3, 9)
PADS = (0, 2, 6)
BOUND = 2e-5
# Those that remember keys and values, in different ways, and one that computes all tokens anew.
REMEMBER = (
    "llama",
    "llama@mqa",
    "qwen3",
    "gpt2",
    "opt",
    "bart",  # positions by column
    "gemma2",  # windows, softcap
    "gpt_oss",  # sinks
    "llama4_text",  # chunks
    "deepseek_v3",  # latents
    "mixtral",
    # Attention code of their own.
    "bloom",  # slopes that count the attended tokens, heads folded into the batch
    "falcon",  # one K/V head
    "falcon@alibi",
    "gptj",
    "gpt_neo",  # windows, from a table
    "mpt",
    "ctrl",
    "openai-gpt",  # gives all tokens at each step
    "bert",
    "xglm",
    "lfm2",  # convolutions
)
RECOMPUTE = ("falcon_mamba",)


@cache
def _model(entry: str) -> PreTrainedModel:
    model = build(entry)
    model.generation_config.eos_token_id = None  # so that every sequence goes on to the end
    model.generation_config.pad_token_id = 0
    return model


@cache
def _compiled(entry: str, tp: int = 2) -> spdcompile.CompiledModel:
    return spdcompile.compile(_model(entry), tp=tp, backend="eager", executor="local")


def _prompt(entry: str) -> tuple[Tensor, Tensor]:
    vocab = _model(entry).config.get_text_config().vocab_size
    return left_padded(token_ids(PROMPT, vocab), PADS)


def _both(entry: str, **settings: Any) -> tuple[Any, Any]:
    """What the model and the compiled model generate, from the same random state."""
    ids, mask = _prompt(entry)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, **settings}
    results = []
    for generate in (_model(entry).generate, _compiled(entry).generate):
        torch.manual_seed(7)
        results.append(generate(ids, attention_mask=mask, **settings))
    return results[0], results[1]


@pytest.mark.parametrize("entry", REMEMBER + RECOMPUTE)
def test_greedy_tokens_are_the_model_s_own(entry: str) -> None:
    if entry not in entries():
        pytest.skip(f"this transformers has no {entry}")
    expected, found = _both(entry)
    assert found.shape == (PROMPT[0], PROMPT[1] + NUM_NEW)
    assert found.unique().numel() > 8, "a model that repeats itself compares little"
    assert torch.equal(found, expected)
    assert bool(_compiled(entry).cache_refusal) == (entry in RECOMPUTE)


SETTINGS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.3},
    "top-k": {"do_sample": True, "top_k": 7},
    "top-p": {"do_sample": True, "top_p": 0.6, "top_k": 0},
    "repetition penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several a prompt": {"do_sample": True, "num_return_sequences": 2},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_generation_do_as_they_do_there(name: str) -> None:
    expected, found = _both("llama", **{"max_new_tokens": 20, **SETTINGS[name]})
    assert torch.equal(found, expected)


def test_scores_are_those_of_the_model() -> None:
    expected, found = _both(
        "llama", max_new_tokens=6, output_logits=True, return_dict_in_generate=True
    )
    for own, other in zip(found.logits, expected.logits, strict=True):
        assert rel_err(own, other) < BOUND


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamer_gets_each_token() -> None:
    ids = token_ids((1, 5), 90)
    recorder = _Recorder()
    out = _compiled("llama").generate(ids, max_new_tokens=6, do_sample=False, streamer=recorder)
    assert recorder.tokens == [*out[0].tolist(), -1]


def test_generation_stops_at_its_stop_token() -> None:
    ids = token_ids((1, 5), 90)
    free = _compiled("llama").generate(ids, max_new_tokens=12, do_sample=False)[0]
    stop = int(free[9])
    first = free[5:].tolist().index(stop) + 6
    out = _compiled("llama").generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=stop)
    assert torch.equal(out[0], free[:first])


def test_a_plan_that_drops_generates_as_its_own_forward_pass_says() -> None:
    model = _model("llama")
    dropped = _compiled("llama").with_mask([True] * model.config.num_hidden_layers)
    ids, mask = _prompt("llama")
    found = dropped.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    kept = _compiled("llama").generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert not torch.equal(found, kept)
    seen = torch.cat([mask, mask.new_ones(PROMPT[0], 10)], 1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    logits = dropped(found, seen, positions).logits
    assert torch.equal(logits[:, PROMPT[1] - 1 : -1].argmax(-1), found[:, PROMPT[1] :])


def test_asking_the_model_for_more_than_logits_is_refused() -> None:
    with pytest.raises(UsageError, match="returns logits alone"):
        _compiled("llama").generate(
            token_ids((1, 4), 90),
            max_new_tokens=2,
            output_attentions=True,
            return_dict_in_generate=True,
        )


# ---- the cache by itself


def _cache_tensors(cache: KVCache) -> list[Tensor]:
    return [tensor for tensors in cache.tensors.values() for tensor in tensors.values()]


def _step(compiled: spdcompile.CompiledModel, cache: KVCache, ids: Tensor) -> Tensor:
    return compiled(ids, past_key_values=cache).logits


def test_rows_go_on_at_positions_of_their_own() -> None:
    compiled = _compiled("llama")
    ids, lengths = token_ids((3, 9), 90), torch.tensor([4, 7, 8])
    prompt = (torch.arange(8) < lengths[:, None]).long()
    cache = compiled.new_cache(3, 12)
    compiled(ids[:, :8] * prompt, prompt, past_key_values=cache)
    cache.set_lengths(lengths)
    new = ids.gather(1, lengths[:, None])
    found = _step(compiled, cache, new)
    for row, n in enumerate(lengths.tolist()):
        whole = compiled(torch.cat([ids[row, :n], new[row]])[None]).logits
        assert rel_err(found[row, -1], whole[0, -1]) < BOUND


def test_window_keeps_the_window_alone() -> None:
    config = _model("gemma2").config
    cache = _compiled("gemma2").new_cache(2, 500)
    slots = {tensor.shape[-2] for tensor in _cache_tensors(cache)}
    assert slots == {config.sliding_window, 500}


def test_latents_are_kept_in_place_of_heads() -> None:
    config = _model("deepseek_v3").config
    cache = _compiled("deepseek_v3").new_cache(2, 50)
    a_token = config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.num_bytes == 2 * 50 * a_token * 4 * config.num_hidden_layers
    graphs = _compiled("deepseek_v3")._remembering.program.graphs.values()
    targets = {node.target for block in graphs for node in block.module.graph.nodes}
    assert ATTEND in targets and ATTEND_CACHED not in targets


def test_latents_that_differ_by_rank_are_kept_by_rank() -> None:
    """A dropped MLP point is pending where the next block makes its latents."""
    plan = Plan(2, _model("deepseek_v3").config.num_hidden_layers, frozenset({(0, "mlp")}))
    compiled, ids = _compiled("deepseek_v3").with_mask(plan), token_ids((2, 9), 90)
    cache = compiled.new_cache(2, 9)
    kept = {part.name: {s.per_rank for s in part.caches.values()} for part in cache.program.parts}
    assert (kept["layers.0"], kept["layers.1"]) == ({False}, {True})
    pieces = (ids[:, :6], ids[:, 6:7], ids[:, 7:])
    found = torch.cat([_step(compiled, cache, piece) for piece in pieces], 1)
    assert rel_err(found, compiled(ids).logits) < BOUND


def test_a_rank_keeps_its_own_heads() -> None:
    config = _model("llama").config
    cache = _compiled("llama").new_cache(2, 50)
    groups = config.num_key_value_heads
    assert {tuple(t.shape) for t in _cache_tensors(cache)} == {
        (2, 2, groups // 2, 50, config.hidden_size // config.num_attention_heads)
    }


def test_cache_that_does_not_fit_is_a_message() -> None:
    compiled, ids = _compiled("llama"), token_ids((2, 6), 90)
    cache = compiled.new_cache(2, 8)
    _step(compiled, cache, ids)
    with pytest.raises(UsageError, match="at most 8 tokens"):
        _step(compiled, cache, ids[:, :3])
    with pytest.raises(UsageError, match="1 sequences"):
        _step(compiled, cache, ids[:1, :1])
    with pytest.raises(UsageError, match="another model or plan"):
        _step(_compiled("llama", 3), cache, ids[:, :1])
    with pytest.raises(UsageError, match="lengths do not fit"):
        cache.set_lengths(torch.tensor([6, 7]))
    window = _compiled("gemma2").new_cache(2, 40)
    for _ in range(4):
        _step(_compiled("gemma2"), window, ids)
    with pytest.raises(UsageError, match="cannot be taken back"):
        window.crop(20)


@pytest.mark.parametrize(
    ("entry", "backend"),
    [
        *(("llama", "eager"), ("llama", "inductor")),
        *(("deepseek_v3", "eager"), ("deepseek_v3", "inductor")),
        *(("bloom", "eager"), ("bloom", "inductor")),
        *(("falcon", "eager"), ("mpt", "eager")),
    ],
)
def test_a_step_allocates_nothing_of_the_size_of_a_cache(entry: str, backend: str) -> None:
    compiled = spdcompile.compile(_model(entry), tp=2, backend=backend, executor="local")
    ids, cache = token_ids((1, 6), 90), compiled.new_cache(1, 4096)
    logits = [_step(compiled, cache, ids[:, :3])]
    logits += [_step(compiled, cache, ids[:, n : n + 1]) for n in (3, 4)]
    with torch.profiler.profile(profile_memory=True) as profile:
        logits.append(_step(compiled, cache, ids[:, 5:]))
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    smallest = min(tensor.nbytes for tensor in _cache_tensors(cache))
    assert 0 < max(allocated) < smallest
    assert rel_err(torch.cat(logits, 1), _compiled(entry)(ids).logits) < BOUND


@pytest.mark.parametrize("entry", ["bloom", "falcon", "gptj", "gpt_neo", "mpt", "lfm2"])
def test_a_step_computes_nothing_for_each_pair_of_tokens(entry: str) -> None:
    compiled, length = _compiled(entry), 127
    ids, cache = token_ids((1, length), 90), compiled.new_cache(1, length)
    _step(compiled, cache, ids[:, :-1])
    with torch.profiler.profile(profile_memory=True) as profile:
        _step(compiled, cache, ids[:, -1:])
    one_head = 4 * length * length  # of scores, in bytes
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) < one_head

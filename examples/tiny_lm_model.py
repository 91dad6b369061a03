"""Tokenizer, model, loss, optimizers, perplexity and export of the tiny example model."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

END_OF_TEXT = "<|endoftext|>"
CHUNK = 512
BALANCE = 0.01  # weight of the loss that spreads tokens over the experts

FAMILIES = {
    "llama": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8},
    "mixtral": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 256,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}
"""Family -> settings of its tiny model: a plain one, and a mixture of experts."""


def train_tokenizer(work: Path, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of the training text (read back when it exists)."""
    folder = work / "tokenizer"
    if not folder.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END_OF_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train([str(work / "train.txt")], trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            model_max_length=1024,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def float32_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in float32, which the CPU kernel does faster than in bfloat16."""
    out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    return out.to(value.dtype).transpose(1, 2).contiguous(), None


def make_model(family: str, vocab: int, end_id: int, seed: int) -> PreTrainedModel:
    """Freshly initialised model of a family of FAMILIES: 8 heads, no grouped queries."""
    torch.manual_seed(seed)
    AttentionInterface.register("float32_attention", float32_attention)
    config = AutoConfig.for_model(
        family,
        **FAMILIES[family],
        vocab_size=vocab,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="float32_attention")


def make_loss(model: PreTrainedModel, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean next-token loss of a batch of windows, in bfloat16 autocast; with experts, balanced."""
    num_experts = getattr(model.config, "num_local_experts", None)
    extra = {"output_router_logits": True} if num_experts else {}

    def loss(windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model.model(input_ids=windows[:, :-1], use_cache=False, **extra)
            logits = model.lm_head(out.last_hidden_state)
        total = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        if num_experts:
            chosen = model.config.num_experts_per_tok
            total += BALANCE * load_balancing_loss_func(out.router_logits, num_experts, chosen)
        return total

    return torch.compile(loss, dynamic=False) if compiled and not num_experts else loss


def make_optimizers(
    model: PreTrainedModel, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, norms and stacked experts.

    The stacked experts take a tenth of AdamW's rate: theirs are matrices, too.
    """
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    stacked = [p for p in model.parameters() if p.ndim == 3]
    others = [
        p for n, p in model.named_parameters() if p.ndim < 2 or (p.ndim == 2 and "layers." not in n)
    ]
    groups = [{"params": others}, *([{"params": stacked, "lr": adam_lr / 10}] if stacked else [])]
    optimizers = [
        torch.optim.Muon(hidden, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: np.ndarray, chunks: int | None = None) -> float:
    """Perplexity over contiguous chunks of 512 tokens (GPTQ protocol: 511 predictions each)."""
    total = len(ids) // CHUNK if chunks is None else min(chunks, len(ids) // CHUNK)
    losses = []
    for start in range(0, total, 8):
        stop = min(total, start + 8)
        rows = torch.from_numpy(ids[start * CHUNK : stop * CHUNK].astype(np.int64)).view(-1, CHUNK)
        logits = model(input_ids=rows, use_cache=False).logits.float()
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(rows), -1).mean(1))
    return math.exp(torch.cat(losses).mean().item())


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, work: Path, out: Path
) -> None:
    """Write the bfloat16 checkpoint folder; files are prepared aside, then moved into place."""
    aside = work / "export"
    shutil.rmtree(aside, ignore_errors=True)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    end_id = tokenizer.eos_token_id
    copy.generation_config = GenerationConfig(
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id
    )
    copy.to(torch.bfloat16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    settings = json.loads((aside / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions know too
    (aside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for split in ("heldout", "calibration"):
        shutil.copy(work / f"{split}.txt", aside)
    out.mkdir(parents=True, exist_ok=True)
    for path in aside.iterdir():
        staged = out / f".{path.name}.new"
        shutil.copyfile(path, staged)
        os.replace(staged, out / path.name)

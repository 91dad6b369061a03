"""Train the tiny Llama that the examples and tests split over ranks, or one of another family.

    python examples/train_tiny_lm.py --work /tmp/tinylm --minutes 63
    python examples/train_tiny_lm.py --work /tmp/tinylm --family mixtral --minutes 15

One CPU thread is enough.  The corpus comes from Debian packages (see ``tiny_lm_corpus.py``); the
tokenizer is a byte-level BPE trained on it; hidden matrices are trained with Muon, everything
else with AdamW, in bfloat16 autocast.  The learning rate warms up and then falls to zero over
``--minutes`` of training time, or over exactly ``--steps`` steps when that is given (the
reproducible way).  A killed run resumes from ``WORK/state.pt`` when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tiny_lm_corpus import build_corpus
from tiny_lm_model import (
    CHUNK,
    END_OF_TEXT,
    FAMILIES,
    export,
    make_loss,
    make_model,
    make_optimizers,
    perplexity,
    train_tokenizer,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SHORT = 256  # window length of the first 80% of the run: attention is half as dear


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/tinylm"), help="corpus and training state"
    )
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: examples/models/tiny-llama, or WORK/FAMILY"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="training time the decay is stretched over"
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="fixed number of steps instead of --minutes"
    )
    parser.add_argument(
        "--interim-minutes", type=float, default=None, help="export once at this time, too"
    )
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between saved states")
    parser.add_argument(
        "--batch", type=int, default=8, help="windows of 512 tokens (or pairs of 256) a step"
    )
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    bundled = Path("examples/models/tiny-llama")
    args.out = args.out or (bundled if args.family == "llama" else args.work / args.family)
    return args


def state_file(args: argparse.Namespace) -> Path:
    """Where a run keeps its state; runs of several families can share one corpus."""
    return args.work / ("state.pt" if args.family == "llama" else f"state-{args.family}.pt")


def encode_split(work: Path, tokenizer: PreTrainedTokenizerFast, split: str) -> np.ndarray:
    """Token ids of a split; in training text every document begins with the end-of-text token."""
    cache = work / f"{split}.npy"
    if not cache.exists():
        text = (work / f"{split}.txt").read_text()
        if split == "train":
            documents = [f"{END_OF_TEXT}{document}\n\n" for document in text.split("\n\n")]
            ids = [token for encoding in tokenizer(documents)["input_ids"] for token in encoding]
        else:
            ids = tokenizer(text)["input_ids"]
        np.save(cache, np.asarray(ids, dtype=np.uint16))
    return np.load(cache)


def rate_factor(progress: float) -> float:
    """Share of the peak learning rate: 3% warm-up, then a straight line from 1 to 0 after 25%."""
    return max(0.0, min(1.0, progress / 0.03 + 0.02, (1.0 - progress) / 0.75))


def batch_at(tokens: np.ndarray, step: int, batch: int, short: bool, seed: int) -> torch.Tensor:
    """Batch number `step`: each epoch visits all windows once, in its own order and phase."""
    per_epoch = (len(tokens) - CHUNK - 1) // CHUNK // batch
    epoch, index = divmod(step, per_epoch)
    random = np.random.default_rng((seed, epoch))
    phase = int(random.integers(CHUNK))
    starts = (
        phase + CHUNK * random.permutation(per_epoch * batch)[index * batch : (index + 1) * batch]
    )
    length = SHORT if short else CHUNK
    starts = (starts[:, None] + np.arange(0, CHUNK, length)).ravel()
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write the training state, replacing the previous one only when complete."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


class Trainer:
    """The training loop with its clock, so that it can stop and resume at any step."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.tokens = encode_split(args.work, tokenizer, "train")
        self.validation = encode_split(args.work, tokenizer, "calibration")
        self.model = make_model(args.family, len(tokenizer), tokenizer.eos_token_id, args.seed)
        self.optimizers = make_optimizers(self.model, args.muon_lr, args.adam_lr, args.weight_decay)
        self.loss = make_loss(self.model, not args.no_compile)
        self.step, self.seconds = 0, 0.0
        self.state_path = state_file(args)
        if self.state_path.exists():
            self.resume()

    def resume(self) -> None:
        """Continue from the saved state."""
        state = torch.load(self.state_path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resumed at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    def save(self) -> None:
        """Save everything needed to resume."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        save_state(
            self.state_path,
            {
                "model": self.model.state_dict(),
                "optimizers": optimizers,
                "step": self.step,
                "seconds": self.seconds,
            },
        )

    def progress(self) -> float:
        """Part of the run that is done, 0 to 1."""
        if self.args.steps is not None:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def train_step(self) -> float:
        """One optimiser step; returns its loss."""
        progress = self.progress()
        factor = rate_factor(progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        loss = self.loss(
            batch_at(self.tokens, self.step, self.args.batch, progress < 0.8, self.args.seed)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def report(self, losses: list[float]) -> None:
        """Progress line with the perplexity of a part of the calibration text."""
        value = perplexity(self.model, self.validation, 24)
        print(
            f"step {self.step} {self.seconds / 60:.1f} min {100 * self.progress():.1f}% "
            f"loss {np.mean(losses):.3f} calibration-ppl {value:.2f}",
            flush=True,
        )

    def run(self) -> None:
        """Train until the schedule is over."""
        losses: list[float] = []
        interim = self.args.interim_minutes
        saved = self.seconds
        if interim is not None and self.seconds > 60 * interim:
            interim = None
        while self.progress() < 1.0:
            began = time.monotonic()
            losses.append(self.train_step())
            self.step += 1
            if self.step % 100 == 0 or self.step in (1, 10, 30):
                self.report(losses)
                losses = []
            if self.seconds - saved > 60 * self.args.save_minutes:
                self.save()
                saved = self.seconds
            if interim is not None and self.seconds > 60 * interim:
                export(self.model, self.tokenizer, self.args.work, self.args.out)
                print("interim export written", flush=True)
                interim = None
            self.seconds += time.monotonic() - began
        self.save()


def main() -> None:
    """Corpus, tokenizer, training, export, held-out perplexity of what was exported."""
    args = parse_arguments()
    torch.set_num_threads(1)
    sources = build_corpus(args.work, args.seed)
    tokenizer = train_tokenizer(args.work, args.vocab)
    trainer = Trainer(args, tokenizer)
    print(
        f"{len(trainer.tokens)} training tokens, {trainer.model.num_parameters()} parameters",
        flush=True,
    )
    trainer.run()
    export(trainer.model, tokenizer, args.work, args.out)
    exported = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    facts = {
        "steps": trainer.step,
        "tokens_seen": trainer.step * args.batch * CHUNK,
        "training_minutes": round(trainer.seconds / 60, 1),
        "parameters": exported.num_parameters(),
        "training_tokens": len(trainer.tokens),
        "heldout_perplexity": perplexity(exported, encode_split(args.work, tokenizer, "heldout")),
        "calibration_perplexity": perplexity(exported, trainer.validation),
        "sources": sources,
    }
    state_file(args).with_suffix(".facts.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1), flush=True)


if __name__ == "__main__":
    main()

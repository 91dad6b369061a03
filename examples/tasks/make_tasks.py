"""Writes the data of the tasks beside it out of the bundled model's held-out text.

python examples/tasks/make_tasks.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TEXT = FOLDER.parent / "models" / "tiny-llama" / "heldout.txt"
SEED = 0
NUM_CHOICES, CHOICES = 40, 4
NUM_DOCUMENTS, LONG = 5, 5000  # characters: more than the model's 1,024 tokens
NUM_COMPLETIONS = 32
CUT = 12  # words of a sentence that are shown


def main(folder: Path = FOLDER) -> None:
    """Writes three files into a folder."""
    draw = random.Random(SEED)
    documents = [part for part in TEXT.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    lines = [line for part in documents for line in part.splitlines()]
    sentences = [line.split() for line in lines if 20 <= len(line.split()) <= 40]
    draw.shuffle(sentences)
    asked, others = sentences[:NUM_CHOICES], sentences[NUM_CHOICES:]
    completed = others[:NUM_COMPLETIONS]
    _write(folder / "choice.jsonl", (_choice(words, others, draw) for words in asked))
    _write(folder / "completion.jsonl", (_completion(words) for words in completed))
    draw.shuffle(documents)
    long = next(part for part in documents if len(part) > LONG)[:LONG]
    short = [part[:800] for part in documents if len(part) > 800][: NUM_DOCUMENTS - 1]
    _write(folder / "rolling.jsonl", ({"text": text} for text in [*short, long]))


def _choice(words: list[str], others: list[list[str]], draw: random.Random) -> dict[str, Any]:
    """The end of a sentence among those of others."""
    ends = [" ".join(other[CUT:]) for other in draw.sample(others, CHOICES - 1)]
    answer = draw.randrange(CHOICES)
    ends.insert(answer, " ".join(words[CUT:]))
    return {"context": " ".join(words[:CUT]), "choices": ends, "answer": answer}


def _completion(words: list[str]) -> dict[str, Any]:
    return {"context": " ".join(words[:CUT]), "next": words[CUT].strip(".,;:()")}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes the study from its sections: Markdown, JSON and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from examples.study.section import Result, Shown, Table
from examples.study.sections import SECTIONS

_HEAD = """# The study

What dropped all-reduces cost on the bundled model, and what wins it back: the questions that the
SPD paper (arXiv 2502.20727) and its reviewers left open, as far as they are about accuracy.
`make study` measures it all and writes this page; nothing in it is typed by hand, the sentences
are computed from the numbers. `make study ARGS="--only NAME"` measures one section anew.

The model is [tiny-llama](../examples/models/tiny-llama/README.md): 7.5 M parameters, 8 blocks, 16
sync points, of which the last cannot be dropped. What is said here of it need not hold for large
models. Everything is chosen, scored and trained on its calibration text; quality is that of
held-out text, beside the undropped model, in percent of perplexity added. ± is the standard error
over chunks, in percentage points: it says how far another held-out text of the kind would move the
figure, not how far another run of the training would. A block is called by its number and `attn`
or `mlp` for its two sync points.
"""


def write(results: Sequence[Result], path: Path) -> None:
    """Writes the page, and beside it a folder with each section's JSON and PNG.

    Args:
        path: the page, such as docs/study.md; the folder is docs/study.
    """
    # Here, so that the sections can be measured without matplotlib.
    from examples.study.figures import draw

    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        result.save(folder / f"{result.name}.json")
        draw(shown(result).panels, folder / f"{result.name}.png")
    path.write_text(page(results, folder.name), encoding="utf-8")


def shown(result: Result) -> Shown:
    """What a section's numbers are shown as."""
    return SECTIONS[result.name].present(result.numbers, result.sizes)


def page(results: Sequence[Result], folder: str) -> str:
    """The page as Markdown."""
    titles = [shown(result).title for result in results]
    contents = [f"- [{title}](#{_anchor(title)})" for title in titles]
    return "\n".join([_HEAD, *contents, "", *(_body(result, folder) for result in results)])


def _body(result: Result, folder: str) -> str:
    section = shown(result)
    lines = [f"## {section.title}", "", section.question, ""]
    lines += [f"- {sentence}" for sentence in section.findings]
    lines += ["", f"![{section.title}]({folder}/{result.name}.png)", ""]
    for table in section.tables:
        lines += [f"{table.title}:", "", _table(table), ""]
    lines += [section.method, "", _facts(result, folder), ""]
    return "\n".join(lines)


def _table(table: Table) -> str:
    return tabulate(table.rows, table.headers, tablefmt="pipe", disable_numparse=True)


def _facts(result: Result, folder: str) -> str:
    facts = result.facts
    return (
        f"({facts['machine']}, {facts['threads']} thread, torch {facts['torch']}, transformers "
        f"{facts['transformers']}, {facts['date']}, {facts['seconds']:.0f} s; "
        f"[numbers]({folder}/{result.name}.json))"
    )


def _anchor(title: str) -> str:
    kept = [letter for letter in title.lower() if letter.isalnum() or letter in " -"]
    return "".join(kept).replace(" ", "-")

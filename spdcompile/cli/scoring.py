"""What `eval` found, as tables and as JSON data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from spdcompile.evaluation import Evaluation
from spdcompile.plan import Plan
from spdcompile.tasks import Score, Scores


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was measured.

    Args:
        plan: of the compiled model.
        texts: text -> what the model is worth on it.
        own, other: what the compiled model scored on tasks, and the reference.
        num_cut: requests of tasks that were cut to the model's length.
    """

    plan: Plan
    texts: Mapping[str, Evaluation]
    own: Scores | None = None
    other: Scores | None = None
    num_cut: int = 0

    def to_dict(self, model: str, reference: str | None) -> dict[str, Any]:
        """JSON data.

        Args:
            model: its directory.
            reference: what it was compared with.
        """
        plan = {key: x for key, x in self.plan.to_dict().items() if key != "measured"}
        return {
            "model": model,
            "reference": reference,
            "plan": plan,
            "texts": [{"text": text, **found.to_dict()} for text, found in self.texts.items()],
            "tasks": [
                {**asdict(score), "reference": other and other.value}
                for score, other in self._pairs()
            ],
            "cut": self.num_cut,
        }

    def _pairs(self) -> list[tuple[Score, Score | None]]:
        """Each score, and the reference's."""
        theirs = (
            {(score.task, score.metric): score for score in self.other.scores} if self.other else {}
        )
        mine = self.own.scores if self.own else ()
        return [(score, theirs.get((score.task, score.metric))) for score in mine]

    def text_rows(self) -> list[list[str]]:
        """A row a text."""
        rows = []
        for text, found in self.texts.items():
            own, other = found.quality, found.reference_perplexity
            cells = [text, f"{found.chunks} x {found.length}", f"{own.perplexity:.3f}"]
            if other is not None and own.kl is not None and own.agreement is not None:
                change = own.perplexity / other - 1
                cells += [f"{other:.3f}", f"{change:+.2%}", f"{own.kl:.5f}", f"{own.agreement:.2%}"]
            rows.append(cells)
        return rows

    def task_rows(self) -> list[list[str]]:
        """A row a metric."""
        rows = []
        for score, other in self._pairs():
            error = "" if score.stderr is None else f"{score.stderr:.4f}"
            count = "" if score.documents is None else str(score.documents)
            cells = [score.task, score.metric, count, f"{score.value:.4f}", error]
            if other is not None:
                cells += [f"{other.value:.4f}", f"{score.value - other.value:+.4f}"]
            rows.append(cells)
        return rows


def render(measured: Measured, reference: str | None, table_format: str) -> str:
    """The tables, and what is compared with what.

    Args:
        reference: what the model was compared with.
        table_format: as tabulate names it.
    """
    plan = measured.plan
    lines = [f"tp {plan.tp}, {len(plan.dropped)} sync points dropped"]
    lines.append("Reference: none" if reference is None else f"Reference: {reference}")
    if measured.num_cut:
        lines.append(f"Cut from the left to the model's length: {measured.num_cut} requests")
    tables = []
    if measured.texts:
        headers = ["text", "chunks", "perplexity"]
        headers += [] if reference is None else ["reference", "change", "KL", "same likeliest"]
        tables.append(_table(measured.text_rows(), headers, table_format))
    if measured.own:
        headers = ["task", "metric", "documents", "score", "stderr"]
        headers += [] if reference is None else ["reference", "difference"]
        tables.append(_table(measured.task_rows(), headers, table_format))
    return "\n\n".join([*tables, "\n".join(lines)])


def _table(rows: list[list[str]], headers: list[str], table_format: str) -> str:
    return tabulate(rows, headers, tablefmt=table_format, disable_numparse=True)

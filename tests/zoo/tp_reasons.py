"""Why the compiler and transformers' plans differ, as data: a pattern of weights -> a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tests.zoo.tp_compare import Kind, Weight


@dataclass(frozen=True, slots=True)
class Reason:
    """What a difference comes from; true for all weights that it covers.

    Args:
        where: attribute of a weight -> regular expression that matches all of its text.
    """

    kind: Kind
    text: str
    where: Mapping[str, str]

    def covers(self, weight: Weight) -> bool:
        """Whether a weight fits the pattern."""
        return weight.kind is self.kind and all(
            re.fullmatch(pattern, str(getattr(weight, name)))
            for name, pattern in self.where.items()
        )


def reasons_for(weight: Weight) -> list[Reason]:
    """The reasons that cover a weight; exactly one covers a difference."""
    return [reason for reason in REASONS if reason.covers(weight)]


REASONS = (
    Reason(
        Kind.THEIRS,
        "An embedding is a lookup, not a linear. Theirs cuts the vocabulary and sums the ranks' "
        "lookups; ours keeps the table on every rank, which costs memory and no communication.",
        {"style": "embedding_rowwise", "words": ""},
    ),
    Reason(
        Kind.GATHERED,
        "A fused projection: theirs cuts its output features in contiguous stretches, which "
        "tear its parts apart, and so gathers them before the module takes them apart; "
        "ours cuts each part by itself and gathers nothing.",
        {"style": "colwise_gather_output", "alike": "False"},
    ),
    Reason(
        Kind.GATHERED,
        "A norm over all heads follows: theirs gathers the heads, so that each rank normalises "
        "and attends as a whole; ours sums the norm's statistic over the ranks and keeps the "
        "heads split.",
        {"style": "colwise_gather_output", "alike": "True", "sums": r".*q_norm.*"},
    ),
    Reason(
        Kind.GATHERED,
        "Behind columns that theirs gathers: each rank cuts its share out of an input that it has "
        "as a whole; ours has only the share.",
        {"style": "rowwise_split_input"},
    ),
    Reason(
        Kind.OURS,
        "Theirs names no weight of the region and leaves all of it on every rank; ours finds the "
        "region in the graph.",
        {"left_out": "True", "style": ""},
    ),
)

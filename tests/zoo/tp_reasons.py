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
        "An embedding is a lookup, not a linear. Theirs cuts the table, by entries or by features, "
        "and puts the ranks' lookups together; ours keeps it on every rank, which costs memory and "
        "no communication.",
        {"style": "embedding_.*", "words": ""},
    ),
    Reason(
        Kind.THEIRS,
        "Read by code that no graph can hold, since it chooses by data: one operator, which every "
        "rank runs as a whole with whole weights.",
        {"reader": r"spd\.call\.default"},
    ),
    Reason(
        Kind.THEIRS,
        "Feeds a recurrence that no graph can hold: one operator, which needs all features on "
        "every rank. Theirs splits this one product and gathers its result; ours does it whole.",
        {"words": r"spd\.call\.default has no placement rule"},
    ),
    Reason(
        Kind.THEIRS,
        "One product makes operands of a recurrence, which are needed whole, and the gate behind "
        "it: its features fall into no units, and the projection behind the gate has no split to "
        "read. Theirs splits each product by itself and gathers its result.",
        {"words": r"no even split by units: .* gives features of no unit too"},
    ),
    Reason(
        Kind.THEIRS,
        "The gate of a recurrence and the projection behind it: the gate is viewed as heads, and "
        "heads and tokens as one dim, along which no rank has an even share. Theirs splits each "
        "product by itself and gathers its result.",
        {
            "style": "colwise_gather_output",
            "words": r"aten\.reshape\.default has no placement rule for S\(2\)",
        },
    ),
    Reason(
        Kind.THEIRS,
        "Layers share K and V. Ours carries no split from block to block, so K and V leave a block "
        "whole, and with them stays whole what attends to them; theirs hands on each rank's heads.",
        {"shared_heads": "leaves|arrives"},
    ),
    Reason(
        Kind.THEIRS,
        "A standard deviation over all inner features sets a cutoff, so they stay together in "
        "ours; theirs takes that of a rank's own features, which is another number.",
        {"operators": r".*aten\.std\..*", "words": "its channels form one unit; .*"},
    ),
    Reason(
        Kind.THEIRS,
        "A router's weights multiply the inner features before the second product, and the "
        "router's weights are needed whole: the two are one class of features to ours.",
        {"operators": r".*aten\.topk\..*", "words": "its channels form one unit; .*"},
    ),
    Reason(
        Kind.THEIRS,
        "A vector with an entry a head, viewed in another shape before it meets the heads: ours "
        "keeps it whole and each rank takes its share of the view.",
        {"takes": "True", "operators": "", "words": ""},
    ),
    Reason(
        Kind.THEIRS,
        "The one K/V head of all query heads: theirs cuts through the head; ours has it on every "
        "rank.",
        {"words": "all units read its output"},
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
        "The same pattern names layers of sparse attention, whose mask is made for all heads, so "
        "that each rank needs them all; ours gathers nothing in the layers of dense attention.",
        {
            "style": "colwise_gather_output",
            "alike": "True",
            "sums": "",
            "elsewhere": r"spd\.call\.default",
        },
    ),
    Reason(
        Kind.GATHERED,
        "Behind columns that theirs gathers: each rank cuts its share out of an input that it has "
        "as a whole; ours has only the share.",
        {"style": "rowwise_split_input"},
    ),
    Reason(
        Kind.INDICES,
        "The heads cannot be dealt evenly: theirs cuts features evenly and through a head; ours "
        "deals whole heads, with more on one rank.",
        {"uneven": "True", "region": r".* attn.*"},
    ),
    Reason(
        Kind.INDICES,
        "Gate and up are one weight: theirs cuts it in two stretches, so that a rank would "
        "multiply halves of the gate with each other; ours cuts both parts, as "
        '"packed_colwise" does.',
        {"style": "colwise", "packed": "True", "uneven": "False"},
    ),
    Reason(
        Kind.OPPOSITE,
        "The head: theirs cuts its input features and sums all logits over the ranks; ours cuts "
        "the vocabulary and gathers the ranks' logits.",
        {"style": "rowwise_split_input", "region": r".* head"},
    ),
    Reason(
        Kind.OPPOSITE,
        "The first of two products: theirs cuts its input and sums its result, and leaves the "
        "second whole; ours cuts its output, and sums the second's result.",
        {"style": "rowwise_split_input", "region": r"(?!.* head$).+"},
    ),
    Reason(
        Kind.OURS,
        "The second of two products, of which theirs splits the first by its input.",
        {"style": "", "left_out": "False"},
    ),
    Reason(
        Kind.OURS,
        "Theirs leaves all weights of the region on every rank; ours finds the region in the "
        "graph.",
        {"left_out": "True", "style": "|mla_kv_a_proj"},
    ),
)

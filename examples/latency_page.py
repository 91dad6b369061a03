"""The text of docs/latency.md, every number of it from the estimates or from measured files."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tabulate import tabulate

from spdcompile.estimate.machines import Machines

if TYPE_CHECKING:
    from examples.latency_tables import Row, Workload

MEASURED = Path(__file__).parent.parent / "docs" / "latency"
PAPER_GAIN, PAPER_BAND = 0.197, 0.03
PUBLISHED = {"nvlink3": 0.879, "pcie4": 2.740, "no-p2p": 2.740}
"""Seconds of a prefill of Llama-3-70B on 4 A100: with NVLink, and with NCCL_P2P_DISABLE=1."""


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Args:
        checks: link -> estimated seconds of a prefill whose latency is published.
    """

    machines: Machines
    rows: Sequence[Row]
    workloads: Sequence[Workload]
    checks: dict[str, float]


def page(shown: Page) -> str:
    """The page in Markdown."""
    sections = [_head(), _constants(shown.machines), _checks(shown.checks), _validation()]
    sections += [_paper(shown.workloads), _replay(), *_models(shown.rows)]
    return "\n\n".join(section for section in sections if section)


def _table(cells: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _head() -> str:
    return (
        "# Latency\n\n"
        "What a step takes on machines that need not be here, and what dropping sync points saves: "
        "`python -m spdcompile.cli estimate`. A rank's work is counted by running its graphs on "
        "the meta device. Compute is a roofline: each kernel takes the longer of its operations "
        "and its bytes. A collective takes alpha and beta. Nothing overlaps.\n\n"
        "*Ideal gain* is the share of a step that the dropped all-reduces take; *expected gain* "
        "counts what the drop adds to compute.\n\n"
        f"`python -m examples.latency_tables --write docs/latency.md`, {datetime.date.today()}: "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}."
    )


def _constants(machines: Machines) -> str:
    devices = [machines.device(name) for name in machines.devices]
    links = [machines.link(name) for name in machines.links]
    cells, fits = [], []
    for link in links:
        for place, of in (("", link), (", across nodes", link.across)):
            for number, way in enumerate(of.ways if of is not None else (), 1):
                name = f"{link.name}{place}" + (f", way {number}" if len(link.ways) > 1 else "")
                times = (f"{1e6 * way.base_s:.2f}", f"{1e6 * way.hop_s:.2f}")
                cells.append((name, *times, f"{1e-9 / way.s_per_byte:.1f}"))
        for row in link.measured:
            found = link.of(row.kind, row.num_bytes, row.ranks)
            times = (f"{1e6 * row.seconds:.1f}", f"{1e6 * found:.1f}")
            error = f"{found / row.seconds - 1:+.0%}"
            fits.append((link.name, row.ranks, f"{row.num_bytes:,}", *times, error))
    sources = [
        f"- {named.name}: {source}." for named in (*devices, *links) for source in named.sources
    ]
    return "\n\n".join(
        (
            "## Constants",
            "All are in `spdcompile/estimate/machines.json`; `--machine FILE` adds others, and "
            "`measure-machine` measures them. A collective over n ranks takes its base, and for "
            "each of its steps (n - 1 for an all-gather, twice that for an all-reduce) the time of "
            "a step and of 1/n of its bytes. Of several ways the fastest is taken.",
            _table(cells, ["link", "base us", "step us", "bus bandwidth GB/s"]),
            "What they were fitted to, by least squares of relative errors:",
            _table(fits, ["link", "ranks", "bytes", "measured us", "model us", "error"]),
            "\n".join(sources),
        )
    )


def _checks(checks: dict[str, float]) -> str:
    if not checks:
        return ""
    cells = [
        (
            link,
            f"{1e3 * PUBLISHED[link]:.0f}",
            f"{1e3 * seconds:.0f}",
            f"{seconds / PUBLISHED[link] - 1:+.0%}",
        )
        for link, seconds in checks.items()
    ]
    return "\n\n".join(
        (
            "## Beside a published latency",
            "Prefill of Llama-3-70B on 4 A100 is published as 879 ms, and as 2,740 ms with "
            "`NCCL_P2P_DISABLE=1`. The number of tokens is not; the all-reduces of 64 MiB that "
            "are published with it are those of 4,096 tokens. The first row was not used for any "
            "constant of compute; the bandwidths of nvlink3 and pcie4 are of those all-reduces.",
            _table(cells, ["link", "published ms", "estimated ms", "error"]),
        )
    )


def _validation() -> str:
    title = "## Beside latencies measured here"
    command = (
        "`python -m spdcompile.cli measure-machine --ranks 2 --output machine.json`, then "
        "`OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 "
        "examples/validate_estimate.py --machine machine.json --json "
        "docs/latency/validation.json`, on idle cores."
    )
    file = MEASURED / "validation.json"
    if not file.exists():
        return f"{title}\n\nNot measured yet: {command}"
    found = json.loads(file.read_text(encoding="utf-8"))
    text = (
        "Constants are measured first, then steps, 5 prompts or 20 tokens in a row. *Then*: "
        "with collectives as long as they were in the same rounds, since between processes of one "
        "machine gloo's change from minute to minute."
    )
    return f"{title}\n\n{command}\n\n{text}\n\n{found['report']}\n\n{found['machine']}"


# ---- the paper's figure


def _paper(workloads: Sequence[Workload]) -> str:
    if not workloads:
        return ""
    cells = [
        (
            *(one.batch, f"{one.prompt:,}"),
            f"{1e3 * one.prefill.plain.total:.0f}",
            f"{one.prefill.expected_gain:.1%}",
            f"{1e3 * one.decode.plain.total:.1f}",
            f"{one.decode.expected_gain:.1%}",
            _tokens(_generated(one, PAPER_GAIN)),
            _band(one),
        )
        for one in workloads
    ]
    headers = ["batch", "prompt", "prefill ms", "gain", "token ms", "gain"]
    headers += [f"new tokens for {PAPER_GAIN:.1%}", "within 3 points"]
    prefill = [one.prefill.expected_gain for one in workloads]
    decode = [one.decode.expected_gain for one in workloads]
    near = {
        one.batch for one in workloads if abs(one.decode.expected_gain - PAPER_GAIN) < PAPER_BAND
    }
    share = max(one.prefill.plain.exchange_share for one in workloads)
    return "\n\n".join(
        (
            "## The paper's 19.7 %",
            "SPD (arXiv 2502.20727) reports 19.7 % lower latency for LLaMA-2-70B on 8 A100 at "
            "10 GB/s with 70 % of the blocks dropped. How many tokens were read and generated for "
            "that, and in what batch, is not known to us. Here the expected gain is "
            f"{min(prefill):.1%} to {max(prefill):.1%} for prefill, whose messages are long, and "
            f"{min(decode):.1%} to {max(decode):.1%} for a decoded token, whose messages are "
            "short. A run that reads a prompt and then generates lies between the two:",
            _table(cells, headers),
            "The columns on the right say after how many generated tokens of each sequence the "
            f"whole run gains {PAPER_GAIN:.1%}, and for how many it is within 3 points of that; "
            "each is taken to cost what the first one does. Decode by itself is within 3 points "
            f"at batch {', '.join(map(str, near)) or '(none)'}. Prefill by itself is "
            f"{100 * (min(prefill) - PAPER_GAIN):.1f} to {100 * (max(prefill) - PAPER_GAIN):.1f} "
            "points above. So the paper's figure is that of a prompt with a short answer, or of "
            "decoding in a batch: ordinary workloads, but which one it was measured with is open. "
            "No constant was chosen to meet it.",
            "70 % of the blocks are 35 % of the all-reduces, so 19.7 % means that communication "
            f"was {PAPER_GAIN / 0.35:.0%} of the latency; in prefill it is up to {share:.0%} here. "
            "Slower compute than is assumed here, as of kernels that are launched one by one, "
            "lowers that share, and with it the gain.",
        )
    )


def _generated(one: Workload, gain: float) -> float:
    """Tokens a sequence after which a run has gained so much; infinite if decode gains more."""
    prefill, decode = one.prefill, one.decode
    above = (prefill.expected_gain - gain) * prefill.plain.total
    below = (gain - decode.expected_gain) * decode.plain.total
    if above <= 0:
        return 0.0
    return above / below if below > 0 else math.inf


def _tokens(count: float) -> str:
    return "any number" if math.isinf(count) else f"{count:,.0f}"


def _band(one: Workload) -> str:
    first, last = (_generated(one, PAPER_GAIN + side * PAPER_BAND) for side in (1, -1))
    if math.isinf(first):
        return "never: decode gains more"
    return f"{first:,.0f} and more" if math.isinf(last) else f"{first:,.0f} to {last:,.0f}"


# ---- a replayed rank, and the models


def _replay() -> str:
    title = "## A rank by itself on a GPU"
    text = (
        "`python -m spdcompile.cli replay examples/latency_configs/LLaMA-2-70B --tp 8 --dtype "
        "bfloat16 --device cuda --link nvlink3 --link pcie4 --link no-p2p --link two-nodes --json "
        "docs/latency/replay.json` runs one rank of eight with random weights (17.5 GB), and waits "
        "as long as the model says in place of each collective."
    )
    file = MEASURED / "replay.json"
    if not file.exists():
        return f"{title}\n\n{text} It has not been run on a GPU yet: the table waits for one."
    found = json.loads(file.read_text(encoding="utf-8"))
    cells = [
        (
            *(row["step"], row["batch"], row["new_tokens"], row["context"]),
            *(row["dropped"], row["link"], row["collectives"]),
            *(f"{1e3 * row[key]:.2f}" for key in ("compute", "communication", "total")),
        )
        for row in found["rows"]
    ]
    headers = ["step", "batch", "tokens", "context", "dropped", "link", "collectives"]
    headers += ["compute ms, measured", "communication ms, modelled", "end to end ms"]
    return f"{title}\n\n{text} On {found['device']}:\n\n{_table(cells, headers)}"


def _models(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "## Models\n\nAll on A100 (80 GB), in the dtype of the configuration. Decode is of one "
        "token at a context of 2,048. *two-nodes* spreads the ranks evenly over two nodes. Ideal: "
        "all attention points dropped; expected: 50, 70 and 100 % of them. Memory is not checked."
    )
    for model in dict.fromkeys(row.model for row in rows):
        cells = [_cells(row) for row in rows if row.model == model]
        headers = ["tp", "link", "step", "compute ms", "communication ms", "communication"]
        headers += ["ideal 100 %", "50 %", "70 %", "100 %"]
        yield f"### {model}\n\n{_table(cells, headers)}"


def _cells(row: Row) -> tuple[object, ...]:
    whole = row.shares[max(row.shares)]
    plain = whole.plain
    return (
        *(row.tp, row.link, row.step),
        *(f"{1e3 * seconds:.2f}" for seconds in (plain.compute, plain.exchange)),
        f"{plain.exchange_share:.1%}",
        f"{whole.ideal_gain:.1%}",
        *(f"{each.expected_gain:.1%}" for each in row.shares.values()),
    )

"""The report as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from spdcompile.report.spans import spans

if TYPE_CHECKING:
    from spdcompile.report.data import ModelReport, PassReport, RefusalReport, RegionReport, Report

_UNITS = {"attn": "head groups", "mlp": "channels", "head": "vocabulary entries"}
_LAYERS_WIDTH, _MODULES_WIDTH, _REASON_WIDTH, _SUBJECT_WIDTH, _WHOLE_WIDTH = 24, 34, 66, 40, 80


def render(report: Report) -> str:
    """All tables of a report, each under its title."""
    sections = {
        f"Split over {report.tp} ranks": regions_table(report),
        "Whole on every rank": whole_table(report),
        "Sync points": points_table(report),
        "Approximated: these read only what all ranks share": routers_table(report),
        "Collectives in one forward pass": collectives_table(report),
        "Parameters": parameters_table(report),
        "Refused": refusals_table(report.refusals),
        "Passes": passes_table(report.passes),
    }
    return "\n\n".join(f"{title}\n{text}" for title, text in sections.items() if text)


def render_model(model: ModelReport, tp: int) -> str:
    """The model and the number of ranks in one line."""
    facts = [
        (model.layers, "layers"),
        (model.hidden, "hidden"),
        (model.heads, "heads"),
        (model.kv_heads, "K/V heads"),
        (model.vocab, "vocabulary"),
    ]
    sizes = [f"{number} {noun}" for number, noun in facts if number is not None]
    return ", ".join([*sizes, model.dtype, f"tp {tp}"]).join((f"{model.type}: ", ""))


def regions_table(report: Report) -> str:
    """Which modules are split, and how their units lie on the ranks."""
    rows = []
    for block in report.blocks:
        for region in block.regions:
            rows.append((block.layers or block.name, _region_row(region)))
    headers = ["layers", "region", "units", "a rank", "split by columns", "split by rows"]
    widths = [_LAYERS_WIDTH, None, None, 24, _MODULES_WIDTH, _MODULES_WIDTH]
    return _table(_grouped(rows), headers, widths)


def whole_table(report: Report) -> str:
    """The matrices that are not split."""
    rows = [
        (block.layers or block.name, (", ".join(block.whole),))
        for block in report.blocks
        if block.whole
    ]
    return _table(_grouped(rows), ["layers", "parameters"], [_LAYERS_WIDTH, _WHOLE_WIDTH])


def routers_table(report: Report) -> str:
    """The modules that choose or weigh experts without what is pending."""
    rows = [
        (block.layers or block.name, (", ".join(block.routers),))
        for block in report.blocks
        if block.routers
    ]
    return _table(_grouped(rows), ["layers", "routers"], [_LAYERS_WIDTH, _WHOLE_WIDTH])


def _region_row(region: RegionReport) -> tuple[str, ...]:
    modules = {
        split: ", ".join(linear.path for linear in region.linears if linear.split == split)
        for split in ("columns", "rows")
    }
    a_rank = str(region.units_per_rank)
    if region.kind == "attn" or not region.in_order:
        a_rank = f"{a_rank}: {' | '.join(region.units)}"
    if region.num_units != region.units_per_rank * len(region.units):
        a_rank = f"{a_rank} (padded)"
    units = f"{region.num_units} {_UNITS[region.kind]}"
    return region.name, units, a_rank, modules["columns"], modules["rows"]


def points_table(report: Report) -> str:
    """The state of every sync point, equal ones in one row."""
    rows = [
        (
            block.layers or block.name,
            (point.name, f"merged into {point.into}" if point.into else point.state, point.reason),
        )
        for block in report.blocks
        for point in block.sync_points
    ]
    return _table(
        _grouped(rows),
        ["layers", "point", "state", "reason"],
        [_LAYERS_WIDTH, None, None, _REASON_WIDTH],
    )


def collectives_table(report: Report) -> str:
    """All-reduces before merging, after it and after the drop; gathers."""
    found = report.collectives
    rows = [
        ("all-reduces, plain split", found.plain_all_reduces, None),
        (
            "all-reduces, partial sums merged",
            found.merged_all_reduces,
            found.merged_bytes_per_token,
        ),
        ("all-reduces, after the drop", found.all_reduces, found.bytes_per_token),
        ("gathers", found.gathers, found.gather_bytes_per_token),
    ]
    return _table(rows, ["", "count", "bytes per token"])


def parameters_table(report: Report) -> str:
    """What the whole model and one rank hold."""
    found = report.parameters
    rows: list[tuple[Any, ...]] = [
        (name, f"{size.count:,}", readable(size.num_bytes))
        for name, size in (
            ("unsharded model", found.total),
            ("one rank", found.per_rank),
            ("  of it split", found.sharded),
            ("  of it whole on every rank", found.replicated),
        )
    ]
    if found.padding_bytes:
        rows.append(("padding, all ranks", "", readable(found.padding_bytes)))
    if found.shared_bytes:
        rows.append(("further copies of shared heads", "", readable(found.shared_bytes)))
    align = ("left", "right", "right")
    return _table(rows, ["", "parameters", "memory"], align=align)


def refusals_table(refusals: Sequence[RefusalReport]) -> str:
    """What was refused and why, equal refusals in one row."""
    rows = [
        (refusal.layers or refusal.where, (refusal.subject, refusal.reason)) for refusal in refusals
    ]
    widths = [_LAYERS_WIDTH, _SUBJECT_WIDTH, _REASON_WIDTH]
    return _table(_grouped(rows), ["layers", "what", "reason"], widths)


def passes_table(passes: Sequence[PassReport]) -> str:
    """Time and effect of each pass."""
    rows = [(p.name, p.numerics, f"{p.seconds:.3f}", p.rewrites, p.nodes) for p in passes]
    headers = ["pass", "numerics", "seconds", "rewrites", "operators"]
    return _table(rows, headers, align=("left", "left", "right", "right", "right"))


def readable(num_bytes: int) -> str:
    """A number of bytes in the largest binary unit of which there is at least one."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{num_bytes} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def _grouped(rows: Iterable[tuple[tuple[int, ...] | str, tuple[str, ...]]]) -> list[tuple]:
    """Rows that are equal but for their layers as one row, in order of appearance."""
    layers_of: dict[tuple[str, ...], list[tuple[int, ...] | str]] = {}
    for layers, row in rows:
        layers_of.setdefault(row, []).append(layers)
    return [(_name_layers(layers), *row) for row, layers in layers_of.items()]


def _name_layers(groups: list[tuple[int, ...] | str]) -> str:
    numbers = spans(number for group in groups if not isinstance(group, str) for number in group)
    names = [group for group in groups if isinstance(group, str)]
    return ", ".join([*([numbers] if numbers else []), *names])


def _table(
    rows: list[tuple],
    headers: list[str],
    widths: list[int | None] | None = None,
    align: tuple[str, ...] | None = None,
) -> str:
    if not rows:
        return ""
    return tabulate(
        rows,
        headers,
        tablefmt="simple",
        maxcolwidths=widths,
        colalign=align,
        disable_numparse=align is not None or widths is not None,
    )

"""Devices: the roofline, measured rates in its place, and files of machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spdcompile.errors import UsageError
from spdcompile.estimate.devices import Device, Rate
from spdcompile.estimate.kernels import FUSED, Kernel
from spdcompile.estimate.machines import FORMAT, Machines

F32, MIB = torch.float32, 2**20
PLAIN = Device("plain", {F32: 1e12}, 1e11, 1e-6)


def product(rows: int) -> Kernel:
    return Kernel("linear", 2.0 * rows * 2**18, MIB, F32, rows, MIB, reads_state=True)


def test_roofline_takes_the_longer() -> None:
    moved = Kernel("linear", 1e3, 10**6, F32)
    computed = Kernel("linear", 1e9, 10, F32)
    assert PLAIN.seconds(moved, MIB) == pytest.approx(1e-6 + 1e-5)
    assert PLAIN.seconds(computed, MIB) == pytest.approx(1e-6 + 1e-3)


def test_unknown_dtype_is_refused_with_those_known() -> None:
    with pytest.raises(UsageError, match=r"torch\.float32"):
        PLAIN.seconds(Kernel("linear", 1.0, 1, torch.bfloat16), MIB)


def test_measured_products_replace_the_roofline() -> None:
    rates = tuple(
        Rate(rows, matrix * MIB, state * MIB, 1e9 * rows * matrix / state)
        for rows in (1, 16)
        for matrix in (1, 4)
        for state in (4, 64)
    )
    device = Device("measured", {F32: 1e12}, 1e11, 0.0, products={F32: rates})
    assert device.seconds(product(1), 4 * MIB) == pytest.approx(2 * 2**18 / (1e9 / 4))
    between = 1e9 * 4 / 16  # 4 rows and 16 MiB are in the middle, by logarithms
    assert device.seconds(product(4), 16 * MIB) == pytest.approx(8 * 2**18 / between)
    beyond = 1e9 / 64
    assert device.seconds(product(1), 2**40) == pytest.approx(2 * 2**18 / beyond)


def test_measured_attention_and_fused_rates_are_used() -> None:
    points = {"attention": {F32: ((32, 1e9),)}, "streams": ((1, 1e11),), "fused": ((1, 1e8),)}
    device = Device("measured", {F32: 1e12}, 1e11, 0.0, **points)
    attention = Kernel("attend_cached", 1e6, 10, F32, rows=32, reads_state=True)
    assert device.seconds(attention, MIB) == pytest.approx(1e-3)
    assert device.seconds(Kernel(FUSED, 0.0, 10**6, F32), MIB) == pytest.approx(1e-2)


def test_every_entry_of_the_package_has_sources() -> None:
    machines = Machines.load()
    assert all(machines.device(name).sources for name in machines.devices)
    assert all(machines.link(name).sources for name in machines.links)


def test_unknown_names_are_refused_with_the_list() -> None:
    machines = Machines.load()
    with pytest.raises(UsageError, match=r"(?s)'a1000'.*a100-80g, h100"):
        machines.device("a1000")
    with pytest.raises(UsageError, match=r"(?s)'string'.*nvlink3"):
        machines.link("string")


def table() -> dict[str, Any]:
    device = {"flops": {"float32": 1e9}, "bytes_per_s": 1e9, "kernel_s": 0, "sources": ["here"]}
    rows = [["all-reduce", 2, 1000, 1e-5], ["all-reduce", 2, 10**6, 1e-3]]
    link = {"ways": [rows], "sources": ["here"]}
    return {"format": FORMAT, "devices": {"cpu": device}, "links": {"pcie4": link}}


def test_file_adds_entries_and_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(table()))
    machines = Machines.load(path)
    assert machines.device("cpu").bytes_per_s == 1e9
    assert machines.device("a100-80g").name == "a100-80g"
    assert machines.link("pcie4").sources == ("here",)


@pytest.mark.parametrize("damage", ["format", "devices", "links"])
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({key: x for key, x in table().items() if key != damage}))
    with pytest.raises(UsageError, match=str(path)):
        Machines.load(path)

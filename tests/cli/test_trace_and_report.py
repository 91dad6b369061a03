"""What `trace-and-report` prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command

LLAMA = ("llama_gqa", "--spd-mask", "0-1")


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def section(text: str, title: str) -> str:
    return text.split(f"\n{title}\n", 1)[1].split("\n\n", 1)[0]


@pytest.fixture(scope="module")
def llama(trace: Command) -> str:
    outcome = trace(*LLAMA)
    assert outcome.code == 0
    assert outcome.err == ""
    return outcome.out


@pytest.fixture(scope="module")
def llama_json(trace: Command) -> dict[str, Any]:
    return json.loads(trace(*LLAMA, "--json", "-").out)


def test_header_names_model_and_ranks(llama: str) -> None:
    header = llama.splitlines()[0]
    sizes = "3 layers, 64 hidden, 8 heads, 4 K/V heads, 96 vocabulary, float32, tp 4"
    assert header == f"llama: {sizes}"


def test_blocks_of_equal_structure_share_rows(llama: str) -> None:
    table = section(llama, "Split over 4 ranks")
    assert lines_with(table, "0-2", "attn", "4 head groups", "self_attn.o_proj")
    assert lines_with(table, "0-2", "mlp", "128 channels", "32", "mlp.gate_proj", "mlp.down_proj")
    assert lines_with(table, "postlude", "head", "96 vocabulary entries", "24", "lm_head")


def test_sync_points_show_their_state(llama: str) -> None:
    table = section(llama, "Sync points")
    assert lines_with(table, "0-1", "attn", "dropped")
    assert lines_with(table, "2 ", "attn", "kept")
    assert lines_with(table, "2 ", "mlp", "cannot be dropped", "it is the last one")


def test_diff_shows_only_operators_that_changed(llama: str) -> None:
    title, _, *diff = llama[llama.index("layers 0-1: attn dropped") :].splitlines()
    changed = [line.partition("  #")[0] for line in diff if line[:5] in ("+    ", "-    ")]
    assert title == "layers 0-1: attn dropped"
    assert changed == [
        "-    sync = spd.sync(linear_3, 'attn')",
        "-    add_3 = add.Tensor(hidden_0, sync)",
        "+    add_3 = add.Tensor(hidden_0, linear_3)",
        "-    sync_1 = spd.sync(linear_6, 'mlp')",
        "-    add_5 = add.Tensor(add_3, sync_1)",
        "+    add_6 = add.Tensor(linear_3, linear_6)",
        "+    sync_1 = spd.sync(add_6, 'mlp')",
        "+    add_5 = add.Tensor(hidden_0, sync_1)",
    ]


def test_every_pass_is_timed(llama: str) -> None:
    names = [line.split()[0] for line in section(llama, "Passes").splitlines()[2:]]
    assert names[0] == "capture"
    assert names[-4:] == ["sync", "localize", "vocabulary", "drop"]


def test_json_counts_collectives_by_hand(llama_json: dict[str, Any]) -> None:
    # 3 layers of 2 all-reduces; a token is 64 float32 on the residual stream, 96 as logits.
    assert llama_json["collectives"] == {
        "plain_all_reduces": 6,
        "merged_all_reduces": 6,
        "all_reduces": 4,
        "gathers": 1,
        "merged_bytes_per_token": 6 * 64 * 4,
        "bytes_per_token": 4 * 64 * 4,
        "gather_bytes_per_token": 96 * 4,
    }


def test_json_counts_parameters_by_hand(llama_json: dict[str, Any]) -> None:
    attention = 64 * 64 + 2 * 32 * 64 + 64 * 64
    mlp = 3 * 128 * 64
    table, norms = 96 * 64, 7 * 64  # embedding or head; two norms a layer, one at the end
    sharded = (3 * (attention + mlp) + table) // 4
    total = 3 * (attention + mlp) + 2 * table + norms
    found = llama_json["parameters"]
    assert found["total"] == {"count": total, "num_bytes": 4 * total}
    assert found["sharded"] == {"count": sharded, "num_bytes": 4 * sharded}
    assert found["replicated"]["count"] == table + norms
    assert found["per_rank"]["count"] == sharded + table + norms
    assert found["padding_bytes"] == found["shared_bytes"] == 0


def test_json_names_linears_units_and_states(llama_json: dict[str, Any]) -> None:
    blocks = {block["name"]: block for block in llama_json["blocks"]}
    assert list(blocks) == ["prelude", "layers 0-1", "layer 2", "postlude"]
    assert blocks["layers 0-1"]["layers"] == [0, 1]
    attention, mlp = blocks["layers 0-1"]["regions"]
    assert attention["units"] == ["0", "1", "2", "3"]
    assert mlp["units"] == ["0-31", "32-63", "64-95", "96-127"]
    assert attention["linears"][1] == {
        "path": "self_attn.k_proj",
        "split": "columns",
        "placement": "S(0)",
        "shape": [32, 64],
        "local_shape": [8, 64],
    }
    states = {p["name"]: p["state"] for p in blocks["layers 0-1"]["sync_points"]}
    assert states == {"attn": "dropped", "mlp": "kept"}
    assert llama_json["model"]["type"] == "llama"


def test_json_file_equals_json_on_stdout(
    trace: Command, llama_json: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    outcome = trace(*LLAMA, "--json", str(path))
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {**written, "passes": []} == {**llama_json, "passes": []}  # but for the times
    assert "Sync points" in outcome.out


def test_padding_and_tied_table_are_counted(command: Command, config_of: Any) -> None:
    argv = ("trace-and-report", config_of("gpt2"), "--tp", "3", "--spd-mask", "all")
    found = json.loads(command(*argv, "--json", "-").out)
    # One of 9 head groups (8 channels each of q, k and v) and one of 129 channels are padding.
    attention = 3 * 8 * 64 + 3 * 8 + 8 * 64
    mlp = 64 + 1 + 64
    assert found["parameters"]["padding_bytes"] == 3 * (attention + mlp) * 4
    # A rank's 3 head groups and 43 channels, with their biases, and its third of the head.
    attention = 72 * 64 + 72 + 24 * 64
    mlp = 43 * 64 + 43 + 43 * 64
    assert found["parameters"]["sharded"]["count"] == 3 * (attention + mlp) + 32 * 64
    # The table is whole as an embedding and split as the head, and once in the unsharded model.
    whole = [fqn for block in found["blocks"] for fqn in block["whole"]]
    assert whole == ["lm_head.weight", "transformer.wpe.weight"]
    norms_and_biases = 3 * (4 * 64 + 2 * 64) + 2 * 64
    assert found["parameters"]["replicated"]["count"] == (96 + 128) * 64 + norms_and_biases
    assert found["collectives"]["all_reduces"] == 3


def test_merged_points_are_named(trace: Command) -> None:
    out = trace("gpt_neox").out
    assert lines_with(section(out, "Sync points"), "0-2", "attn", "merged into mlp")
    counts = section(out, "Collectives in one forward pass")
    assert lines_with(counts, "plain split", " 6")
    assert lines_with(counts, "partial sums merged", " 3 ")
    assert "before the drop" not in out


def test_points_behind_a_norm_cannot_be_dropped(trace: Command) -> None:
    table = section(trace("gemma2").out, "Sync points")
    assert lines_with(table, "0-2", "attn", "cannot be dropped", "post_attention_layernorm acts on")


def test_experts_are_split_and_their_router_is_whole(trace: Command) -> None:
    out = trace("mixtral").out
    assert "mlp.experts.gate_up_proj" in section(out, "Split over 4 ranks")
    assert "mlp.gate.weight" in section(out, "Whole on every rank")
    assert lines_with(section(out, "Refused"), "0-2", "mlp.gate", "its channels form one unit")
    assert lines_with(section(out, "Sync points"), "attn", "cannot be dropped", "mlp.gate chooses")


def test_router_setting_lets_a_mixture_of_experts_drop_and_is_reported(trace: Command) -> None:
    refused = trace("mixtral", "--spd-mask", "0-1")
    assert refused.code == 2
    assert "router='replicated'" in refused.err
    out = trace("mixtral", "--spd-mask", "0-1", "--router", "replicated").out
    assert lines_with(section(out, "Sync points"), "0-1", "attn", "dropped")
    approximated = section(out, "Approximated: these read only what all ranks share")
    assert lines_with(approximated, "0-1", "mlp.gate")
    assert lines_with(section(out, "Collectives in one forward pass"), "after the drop", "4")


def test_split_vocabulary_is_one_more_point(trace: Command) -> None:
    split, default = (trace("llama", *options).out for options in (("--vocab", "split"), ()))
    assert lines_with(section(split, "Sync points"), "prelude", "embed", "cannot be dropped")
    assert not lines_with(section(default, "Sync points"), "prelude")


def test_own_attention_is_reported(trace: Command) -> None:
    refused = section(trace("bloom").out, "Refused")
    assert lines_with(refused, "model", "attention as one operator", "its own attention code")


def test_pending_sums_reach_the_next_layer(trace: Command) -> None:
    out = trace("llama_gqa", "--drop", "0.mlp").out
    assert "layer 0: mlp dropped" in out
    assert "layer 1: sums pending from before" in out
    assert "+    input hidden_0_partial" in out


def test_print_shows_the_program_after_a_pass(trace: Command) -> None:
    out = trace(*LLAMA, "--print", "split", "--print", "drop").out
    first, second = out.split("# the program after ")[1:]
    assert first.startswith("split\ndef prelude:")
    assert "spd.sync" not in first
    assert second.startswith("drop\n")
    assert "dropped: attn" in second
    assert "Sync points" in second


def test_stop_after_ends_with_the_program(trace: Command) -> None:
    outcome = trace("mixtral", "--stop-after", "regions")
    assert outcome.code == 0
    assert "Refused" in outcome.out
    assert [line.split()[0] for line in section(outcome.out, "Passes").splitlines()[2:]] == [
        "capture",
        "normalize",
        "split",
        "tokens",
        "regions",
    ]
    assert "# the program after regions\ndef prelude:" in outcome.out
    assert "Sync points" not in outcome.out


def test_stop_after_capture_prints_one_graph(trace: Command) -> None:
    out = trace("llama_gqa", "--stop-after", "capture", "--print", "capture").out
    assert out.count("# the program after capture\ndef model:") == 1

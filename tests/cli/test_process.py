"""The command line as its own process: start-up, exit code, and the time and memory of 8B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MAX_SECONDS = 60
MAX_KIB = 2 * 1024 * 1024

# CPU seconds, which a busy machine does not change; VmHWM, because ru_maxrss also counts what the
# process was before it became this program.
MEASURED = """
import re, sys, time
from spdcompile.cli import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print("MEASURED", code, time.process_time(), peak)
"""

HELP = """
import sys
from spdcompile.cli import main
try:
    main(sys.argv[1:])
finally:
    print("TORCH", "torch" in sys.modules)
"""


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *argv], {**os.environ, **environ}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_command_runs_as_a_module(config_of: Callable[[str], str]) -> None:
    argv = ("trace-and-report", config_of("llama_gqa"), "--tp", "2", "--spd-mask", "all")
    result = run("-m", "spdcompile.cli", *argv)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "layers 0-2: attn dropped" in result.stdout


def test_mistake_sets_the_exit_code_of_the_process() -> None:
    argv = ("trace-and-report", "nowhere", "--tp", "2")
    result = run("-m", "spdcompile.cli", *argv, SPD_LOGS="everything")
    assert result.returncode == 2
    assert result.stderr.startswith("spdcompile: SPD_LOGS lists an unknown component.")


@pytest.mark.parametrize("argv", [("--help",), ("trace-and-report", "--help")])
def test_help_does_not_wait_for_torch(argv: tuple[str, ...]) -> None:
    result = run("-c", HELP, *argv)
    assert result.returncode == 0
    assert "usage: spdcompile" in result.stdout
    assert result.stdout.endswith("TORCH False\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_llama_8b_takes_a_minute_and_two_gigabytes_at_most(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    report = tmp_path / "report.json"
    options = ("--tp", "8", "--spd-mask", "0-20", "--json", str(report))
    result = run("-c", MEASURED, "trace-and-report", str(tmp_path), *options)
    assert result.stderr == ""
    code, seconds, peak = result.stdout.rpartition("MEASURED ")[2].split()
    assert int(code) == 0
    assert float(seconds) < MAX_SECONDS
    assert int(peak) < MAX_KIB
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["model"]["dtype"] == "bfloat16"
    assert found["parameters"]["total"] == {"count": 8_030_261_248, "num_bytes": 16_060_522_496}
    assert found["collectives"]["all_reduces"] == 64 - 21 + 1  # the table of 1 GiB is split
    assert found["collectives"]["bytes_per_token"] == (64 - 21 + 1) * 4096 * 2

"""A rank of `measure_machine` with few sizes and rounds."""

from __future__ import annotations

import sys

from spdcompile.estimate import measuring_host, measuring_links, measuring_rank, timing

FEWER = {
    measuring_rank: {
        "_ROWS": (1, 8),
        "_WIDTHS": (64,),
        "_SETS": (2**16,),
        "_STREAMS": (2**14, 2**16),
        "_FUSED": (8,),
        "_TOKENS": (8,),
        "_SWEEPS": 2,
        "_LINK_ROUNDS": 4,
    },
    measuring_host: {"_WIDTHS": (64, 128), "_LAYERS": (1, 2)},
    timing: {"_SECONDS": 0.01, "_MOST_ROUNDS": 4, "_FEWEST_ROUNDS": 2},
    measuring_links: {"_REDUCED": (2**10, 2**14), "_GATHERED": (2**12,), "_BURST": 2},
}

if __name__ == "__main__":
    for module, values in FEWER.items():
        for name, value in values.items():
            assert hasattr(module, name), f"{name} is called otherwise now"
            setattr(module, name, value)
    measuring_rank.main(sys.argv[1:])

"""A rank of `measure_machine` with few sizes and rounds."""

from __future__ import annotations

import sys

from spdcompile.estimate import measuring_rank

FEWER = {
    "_ROWS": (1, 8),
    "_WIDTHS": (64,),
    "_SETS": (2**16,),
    "_STREAMS": (2**14, 2**16),
    "_FUSED": (8,),
    "_TOKENS": (8,),
    "_REDUCED": (2**10, 2**14),
    "_GATHERED": (2**12,),
    "_SECONDS": 0.01,
    "_MOST_ROUNDS": 4,
    "_FEWEST_ROUNDS": 2,
    "_BURST": 2,
}

if __name__ == "__main__":
    for name, value in FEWER.items():
        assert hasattr(measuring_rank, name), f"{name} is called otherwise now"
        setattr(measuring_rank, name, value)
    measuring_rank.main(sys.argv[1:])

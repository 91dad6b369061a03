"""What the measurement needs of private torch; tried on 2.11, 2.12 and 2.13."""

from __future__ import annotations

import torch._dynamo.config


def fail_beyond_recompilations(limit: int) -> None:
    """Has torch.compile raise after so many programs of one function, and not run it eagerly."""
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.fail_on_recompile_limit_hit = True

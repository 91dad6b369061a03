"""Settings that hold for every test: one thread, reproducible examples."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so before it

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The first call of a compiled function takes seconds: a deadline per example would measure that,
# and so would the check for slow data generation.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("local", _COMMON)
settings.register_profile("ci", _COMMON, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

"""`python -m spdcompile.cli`."""

from __future__ import annotations

import sys

from spdcompile.cli import main

sys.exit(main())

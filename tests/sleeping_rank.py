"""A rank that leaves its process id in a folder, and has nothing to do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(600)

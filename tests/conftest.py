"""Makes the shared helpers of this folder (golden_files) importable from every test module.

Where several processes run the tests, each takes its share of the cores: before torch is imported, so that commands
that tests start do the same.
"""

import os
import sys
from pathlib import Path

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

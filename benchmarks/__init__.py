"""Benchmarks, run from a checkout: `python -m benchmarks.cuda.bench --help`."""

import sys
from pathlib import Path

# The installed losart is measured: the sources beside this folder may not be built.
if sys.path[0] == str(Path(__file__).parents[1]):
    sys.path.append(sys.path.pop(0))

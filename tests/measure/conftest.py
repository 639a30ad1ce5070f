"""Lets tests import the benchmarks, after all that is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

"""For which CUDA torch was built, as JSON; null: for none."""

from __future__ import annotations

import json


def main() -> None:
    from torch.version import cuda

    print(json.dumps(cuda))

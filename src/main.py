"""Serve a node from a checkout: `cd src && python main.py`. The same as `divault serve` in the folder above."""

import os
import sys
from pathlib import Path

from divault.cli import main

if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)  # .env, cache, logs and state lie there
    sys.argv[1:1] = ["serve"]
    main()

"""``python -m perdure.scripts.benchmarks``: what scripts/bench runs once everything is installed."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m perdure.recovery``: a reaper, and nothing else."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())

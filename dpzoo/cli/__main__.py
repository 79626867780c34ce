"""``python -m dpzoo.cli``."""

import sys

from dpzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m rawloop`, as torchrun starts it."""

import sys

from rawloop.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m transcoder` is the `transcoder` command."""

import sys

from transcoder.cli import main

if __name__ == "__main__":
    sys.exit(main())

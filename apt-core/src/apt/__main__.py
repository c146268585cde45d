"""``python -m apt`` is ``apt-core``."""

import sys

from apt.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m deskgrid` is `deskgrid`."""

import sys

from deskgrid.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

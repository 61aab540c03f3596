"""`python -m daq_lightning` is the command `daq-lightning`."""

import sys

from daq_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())

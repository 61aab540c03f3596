"""`python -m daq_lightning` is the command `daq-lightning`."""

from daq_lightning.cli import program

if __name__ == "__main__":
    program()

"""Edit pictures by an instruction. `python sample.py --help` shows examples."""

from ipx2p.cli import run_command
from ipx2p.commands.edit import main

if __name__ == "__main__":
    run_command(main)

"""Convert weights between layouts. `python convert_weights.py --help` shows examples."""

from ipx2p.cli import run_command
from ipx2p.commands.convert import main

if __name__ == "__main__":
    run_command(main)

"""Train an edit model, or an autoencoder for one. `python train.py --help` shows examples."""

from ipx2p.cli import run_command
from ipx2p.commands.train import main

if __name__ == "__main__":
    run_command(main)

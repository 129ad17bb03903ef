"""ipx2p: instruction-tune Stable Diffusion in plain PyTorch."""

__version__ = "0.1.0"

"""ipx2p: instruction-tune Stable Diffusion in plain PyTorch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipx2p.editing.editor import Editor

__version__ = "0.1.0"
__all__ = ["Editor", "__version__"]


def __getattr__(name: str) -> Any:
    """`from ipx2p import Editor`; torch is imported only then."""
    if name == "Editor":
        from ipx2p.editing.editor import Editor

        return Editor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""`from ipx2p.editor import Editor`, the public name of `ipx2p.editing.editor` (layer 4)."""

from ipx2p.editing.editor import Editor

__all__ = ["Editor"]

"""An edit as metrics see it (layer 4)."""

from dataclasses import dataclass, field

from torch import Tensor

from ipx2p.eval.networks import Networks
from ipx2p.metrics import Distance, outside

SHOWN_WHOLE = {"clip", "dino"}  # these resize pictures themselves, of any size


@dataclass(frozen=True)
class Views:
    """One edit beside what it is compared with.

    edited, source, target: pixels01 at the size of the source, or of the target, (1, 3, H, W).
    whole: "edited", "source" and "target" as they were given, (3, h, w) each, for networks.
    captions: of source and target. mask: 1 where the picture may change, (H, W), if it is given.
    changing: likewise, (1, 1, H, W); without a mask, where the target differs from the source.
    shared: features of the case, for its other edits.
    """

    edited: Tensor
    source: Tensor
    target: Tensor | None
    whole: dict[str, Tensor]
    captions: tuple[str, str] | None
    mask: Tensor | None
    changing: Tensor | None
    networks: Networks
    shared: dict[tuple[str, str], Tensor]
    own: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def compare(self, measure: Distance, to: str) -> Tensor:
        """Of the edit and the "target" or "source"; or the source, where the picture must not
        change ("outside") or as PIE-Bench does it ("background").
        """
        if to == "outside":
            return outside(measure, self.edited, self.source, self.changing)
        pair = (self.edited, getattr(self, to)) if to != "background" else self.background
        return measure(*pair)

    @property
    def background(self) -> tuple[Tensor, Tensor]:
        """Edit and source, black where the picture may change."""
        return self.edited * (1 - self.mask), self.source * (1 - self.mask)

    def features(self, network: str, view: str) -> Tensor:
        """Of "edited", "source", "target", "inside" (the edit within the mask) or a caption."""
        kept = self.own if view in ("edited", "inside") else self.shared
        if (network, view) not in kept:
            net = getattr(self.networks, network)
            if view.endswith("_caption"):
                kept[network, view] = net.text(self.captions[view == "target_caption"])
            elif view == "inside":
                kept[network, view] = net.look(self.edited[0] * self.mask)
            else:
                picture = self.whole[view] if network in SHOWN_WHOLE else getattr(self, view)[0]
                kept[network, view] = net.look(picture)
        return kept[network, view]

    def cosine(self, network: str, other: str, view: str = "edited") -> Tensor:
        """Of features of length 1, (1,)."""
        a, b = self.features(network, view), self.features(network, other)
        return (a.double() * b.double()).sum(dim=-1).clamp(max=1)

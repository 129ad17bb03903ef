"""How much of the network runs in a step: DeepCache (layer 1)."""

from ipx2p.diffusion.guidance.scheme import DepthModifier, parameter, scheme
from ipx2p.diffusion.schedule import Step


@scheme(
    name="deepcache",
    formula="deep layers run in steps 1, 1 + every, ...; between them the deep feature is kept",
    paper="arXiv:2312.00858",
    scales="as in the linear scheme",
    full_at=None,
    idle={"every": 1},
)
class DeepCache(DepthModifier):
    """DeepCache: the deep feature of the network changes slowly, so most steps keep it.

    Between whole steps only the first layer of the contracting path and the last two of the
    expanding path run, with the convolutions around them: 22 % of the FLOPs of Stable Diffusion at
    512 pixels. In the authors' package that is cache_branch_id 1; their default, 0, leaves out the
    first layer and one of the last two (8 %). Each branch keeps its own feature, at most until the
    next whole step; one that has none, as at the start of an interval, runs whole. The second
    evaluation in a step of Heun's method is like the first.
    """

    every: int = parameter(3, 1, 1000)

    def is_whole(self, step: Step) -> bool:
        return step.index % self.every == 0

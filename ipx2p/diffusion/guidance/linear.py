"""Linear schemes: weighted sums of the branches (layer 1).

Each is an anchor, the full branch unless declared otherwise, plus terms, so that its coefficients
sum to 1 and it is the same in any prediction space. s_T is `guidance_scale`, the push along the
instruction, s_I is `image_guidance_scale`, the push towards the source.

Branches without the source are trained only by samples whose source was dropped. Those with the
instruction alone (`text_first`, `symmetric`, `composable`, `full`) see the fewest: 5 % by default.
"""

from ipx2p.diffusion.guidance.branches import FULL, IMAGE, NULL, TEXT, Branch, in_order
from ipx2p.diffusion.guidance.scheme import Term, scheme


@scheme(
    formula="null + s_I (image - null) + s_T (full - image)",
    paper="arXiv:2211.09800, eq. 3",
    scales="(1, 1) is the full branch; equal scales are plain guidance of both conditions at once",
    plain="ip2p",
)
def ip2p(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Source first, then the instruction given the source (InstructPix2Pix)."""
    return [
        Term("image", image_guidance_scale - 1, IMAGE, NULL),
        Term("text", guidance_scale - 1, FULL, IMAGE),
    ]


@scheme(
    formula="null + s_T (text - null) + s_I (full - text)",
    paper="arXiv:2211.09800, the other order of its factorisation",
    scales="(1, 1) is the full branch; equal scales are plain guidance of both conditions at once",
    plain_at="s_T == s_I",
)
def text_first(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Instruction first, then the source given the instruction."""
    return [
        Term("text", guidance_scale - 1, TEXT, NULL),
        Term("image", image_guidance_scale - 1, FULL, TEXT),
    ]


@scheme(
    formula="null + s_T (full - null)",
    paper="arXiv:2207.12598",
    scales="guidance_scale pushes along both conditions; image_guidance_scale is not used",
    plain_at="s_T == s_I",
)
def joint(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Both conditions as one: classifier-free guidance."""
    return [Term("text", guidance_scale - 1, FULL, NULL)]


@scheme(
    formula="image + s_T (full - image)",
    paper="arXiv:2211.09800, at s_I 1",
    scales="guidance_scale as in ip2p; image_guidance_scale is not used",
    plain_at="s_I == 1",
)
def text_only(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Guide along the instruction only."""
    return [Term("text", guidance_scale - 1, FULL, IMAGE)]


@scheme(
    formula="text + s_I (full - text)",
    paper="arXiv:2211.09800, text first, at s_T 1",
    scales="image_guidance_scale as in text_first; guidance_scale is not used",
    plain_at="s_T == s_I == 1",
)
def image_only(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Guide towards the source only."""
    return [Term("image", image_guidance_scale - 1, FULL, TEXT)]


@scheme(
    formula="(image + text) / 2 + s_T (full - image) + s_I (full - text)",
    paper="arXiv:2309.03895",
    scales="(0.5, 0.5) is the full branch, so they do not compare with those of ip2p",
    full_at=(0.5, 0.5),
)
def symmetric(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Neither condition first (InstructDiffusion)."""
    return [
        Term("text", guidance_scale - 0.5, FULL, IMAGE),
        Term("image", image_guidance_scale - 0.5, FULL, TEXT),
    ]


@scheme(
    formula="null + s_I (image - null) + s_T (text - null)",
    paper="arXiv:2206.01714",
    scales="each pushes along one condition as if the other were absent; never the full branch",
    full_at=None,
    anchor=NULL,
    plain_at="s_T == 0",
)
def composable(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """The pushes of each condition alone, summed (composable diffusion)."""
    return [
        Term("image", image_guidance_scale, IMAGE, NULL),
        Term("text", guidance_scale, TEXT, NULL),
    ]


@scheme(
    formula="null + s_I (image - null) + s_T (text - null) + s_J (full - image - text + null)",
    paper="arXiv:2206.01714, with the interaction of both conditions",
    scales="as in composable, and joint_scale; with joint_scale 1, (1, 1) is the full branch",
    plain="full:joint_scale=s_T",
)
def full(
    guidance_scale: float, image_guidance_scale: float, *, joint_scale: float = 1.0
) -> list[Term]:
    """`composable` plus what only both conditions together say, times `joint_scale` (s_J).

    With three equal scales it is `joint`.
    """
    return [
        Term("image", image_guidance_scale - joint_scale, IMAGE, NULL),
        Term("text", guidance_scale - 1, TEXT, NULL),
        Term("both", joint_scale - 1, FULL, TEXT),
    ]


@scheme(
    formula="null + s_I (image + s_T (full - image) - null)",
    paper="ComfyUI's nested dual guidance",
    scales="image_guidance_scale pushes the whole of the edit: ip2p at s_T' = s_T s_I",
    plain_at="s_I == 1 or s_T == 0",
)
def nested(guidance_scale: float, image_guidance_scale: float) -> list[Term]:
    """Guidance inside guidance."""
    return ip2p(guidance_scale * image_guidance_scale, image_guidance_scale)


@scheme(
    formula="c_null null + c_image image + c_text text + (1 - c_null - c_image - c_text) full",
    paper="none: any linear scheme",
    scales="not used: the coefficients are the parameters, the full branch gets the rest to 1",
    full_at=None,
    plain="free:null=1-s_I,image=s_I-s_T",
)
def free(
    guidance_scale: float,
    image_guidance_scale: float,
    *,
    null: float = 0.0,
    image: float = 0.0,
    text: float = 0.0,
) -> list[Term]:
    """Coefficients of your own; each that is not 0 costs one more evaluation."""
    given = ((null, NULL), (image, IMAGE), (text, TEXT))
    return [Term("both", -coefficient, FULL, branch) for coefficient, branch in given]


def coefficients(anchor: Branch, terms: list[Term]) -> dict[Branch, float]:
    """The anchor and terms as one weighted sum of branches, without those of weight 0."""
    weights = {anchor: 1.0}
    for term in terms:
        weights[term.plus] = weights.get(term.plus, 0.0) + term.factor
        weights[term.minus] = weights.get(term.minus, 0.0) - term.factor
    # Where scales cancel, rounding leaves 1e-16, which must not cost an evaluation.
    return {branch: weights[branch] for branch in in_order(weights) if abs(weights[branch]) > 1e-9}

"""A stack at work on predictions that a test makes up, as `GuidedDenoiser` has it at work."""

from ipx2p.diffusion.guidance.registry import parse_guidance
from ipx2p.diffusion.guidance.space import Moment


class Started:
    """A specification, and what is remembered during one edit."""

    def __init__(self, text, guidance_scale, image_guidance_scale):
        self.spec = parse_guidance(
            text, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale
        )
        self.memory = {}

    def __getattr__(self, name):
        return getattr(self.spec, name)

    def branches(self, step):
        """The branches that run."""
        return self.spec.plan(step).branches

    def blend(self, denoised, x, sigma, step):
        """Guided denoised latents."""
        return self.spec.plan(step).blend(denoised, Moment(x, sigma, step, self.memory))

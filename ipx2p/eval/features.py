"""CLIP features of pictures and sentences, through transformers (layer 4).

As InstructPix2Pix measures them (arXiv:2211.09800, sec. 4): pictures are resized to the square that
the model sees, bicubic, regardless of aspect; features have length 1. Pictures are `pixels01`, in
[0, 1]; the authors' script feeds CLIP pictures in [-1, 1], so its curves are different.
"""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from ipx2p.errors import InputError
from ipx2p.metrics import RANGE_TOLERANCE
from ipx2p.tensor_files.tensors import digest
from ipx2p.weights.readers import HUB_ID

NO_CHANGE = 1e-5  # of features of length 1; one level of one pixel is above it


class ClipFeatures:
    """Features of length 1, in float32.

    Args:
        name: for reports, since numbers of different CLIP models do not compare.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizerFast, name: str) -> None:
        self.model = model.float().eval()
        self.tokenizer = tokenizer
        self.name = name
        self.size = model.config.vision_config.image_size
        self.digest = digest(model.state_dict())

    @classmethod
    def load(cls, source: str, device: torch.device) -> "ClipFeatures":
        """From a folder or hub id with a whole CLIP model and its tokenizer; else InputError."""
        where = os.path.expanduser(source)
        if not os.path.isdir(where) and not HUB_ID.fullmatch(source):
            raise InputError(
                f"{source} is no folder with a CLIP model: expected one, or a hub id such as "
                "openai/clip-vit-large-patch14"
            )
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # what is missing is said below, in one line
        logging.disable_progress_bar()
        try:
            model, report = CLIPModel.from_pretrained(
                where, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = CLIPTokenizerFast.from_pretrained(where)
        except Exception as error:  # of any kind that its parsers and the hub raise
            reason = next(iter(str(error).strip().splitlines()), repr(error))
            raise InputError(f"{source} holds no CLIP model with a tokenizer: {reason}") from error
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
        lacking = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
        if lacking:
            raise InputError(
                f"{source} is no whole CLIP model: {len(lacking)} tensors are missing or of "
                f"another shape ({lacking[0]}, ...): name the folder of the whole model"
            )
        return cls(model.to(device), tokenizer, source)

    @torch.no_grad()
    def images(self, pixels01: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> features, (N, D), on the CPU."""
        low, high = pixels01.min().item(), pixels01.max().item()
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise InputError(
                f"CLIP: expected finite values in [0, 1], got {low:.6g}..{high:.6g}: convert "
                "[-1, 1] with ipx2p.images.pixels01_from_pixels"
            )
        size = (self.size, self.size)
        square = F.interpolate(pixels01.float(), size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        shown = ((square - mean) / std).to(self.model.device)
        pooled = self.model.vision_model(pixel_values=shown).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> features, (N, D), on the CPU; sentences too long for the model are cut."""
        tokens = self.tokenizer(
            [*sentences],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1).cpu()


def direction_similarity(
    source: Tensor, edited: Tensor, source_text: Tensor, target_text: Tensor
) -> Tensor:
    """Cosine of the change in pictures and the change in captions, (N,); no change gives 0.

    Features of one picture differ by rounding from batch to batch; that is no change either.

    Args: features of length 1, (N, D) or (D,).
    """
    change = edited - source
    similarity = F.cosine_similarity(change, target_text - source_text, dim=-1)
    return torch.where(change.norm(dim=-1) < NO_CHANGE, 0.0, similarity)

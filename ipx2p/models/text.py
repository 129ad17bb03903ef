"""Instructions to text states: the CLIP tokenizer and text encoder (layer 1).

Published weights of the encoder carry the prefix `text_model.`, which some programs drop: they are
read with and without it, and written with it. The tokenizer is that of transformers.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizerFast

from ipx2p.devices import copy_to
from ipx2p.errors import InputError
from ipx2p.files import atomic_write, read_json, write_json
from ipx2p.models.clip import ClipText
from ipx2p.tensor_files.tensors import (
    TEXT_STEMS,
    find_weights,
    load_strict,
    read_tensors,
    save_tensors,
)

PREFIX = "text_model."
POSITION_IDS = "embeddings.position_ids"  # a buffer in old files, 0..76; no weight


class TextEncoder(nn.Module):
    """Tokenizer and encoder in one: sentences in, states (B, 77, D) out.

    Args:
        model: the network.
        config: the published config.json of the model, written back unchanged by `save`.
        tokenizer: its tokenizer.
        tokenizer_files: name -> content of the tokenizer's files, also written back unchanged.
    """

    def __init__(
        self,
        model: ClipText,
        config: dict,
        tokenizer: CLIPTokenizerFast,
        tokenizer_files: Mapping[str, bytes],
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_files = tokenizer_files

    @property
    def length(self) -> int:
        """Tokens of every instruction, padding included (77)."""
        return self.model.length

    @property
    def width(self) -> int:
        """D, the width of a state."""
        return self.model.width

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Token ids, padded, (B, 77). A longer sentence is cut; a warning shows what was cut."""
        room = self.length - 2  # begin and end of text
        for sentence in sentences:
            check_text(sentence)
            offsets = self.tokenizer(
                sentence, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )["offset_mapping"]
            if len(offsets) > room:
                warnings.warn(
                    f"the instruction has {len(offsets) + 2} tokens, {self.length} fit; "
                    f"this end of it is cut: {sentence[offsets[room][0] :]!r}",
                    stacklevel=2,
                )
        batch = self.tokenizer(
            list(sentences),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return batch["input_ids"]

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, 77) -> states after the last norm, (B, 77, D)."""
        return self.model(ids)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> states (B, 77, D) on the encoder's device, in its dtype.

        The empty string gives the null text of classifier-free guidance.
        """
        device = next(self.parameters()).device
        return self(copy_to(self.tokenize(sentences), device))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        *,
        tokenizer: Path | None = None,
    ) -> "TextEncoder":
        """From a weights folder that holds `text_encoder/` and `tokenizer/`; on the CPU.

        Args:
            dtype: of the weights; None keeps what the file has.
            tokenizer: folder with the tokenizer's files, instead of that in the folder.

        Raises: InputError for a missing or damaged file, or another kind of text encoder.
        """
        folder = Path(folder)
        config_path = folder / "text_encoder" / "config.json"
        config = read_json(config_path)
        if config.get("model_type") != "clip_text_model":
            raise InputError(
                f"{config_path}: model_type is {config.get('model_type')!r}, expected "
                "'clip_text_model'"
            )
        with torch.device("meta"):
            model = ClipText(config, str(config_path))
        path = find_weights(folder / "text_encoder", TEXT_STEMS)
        load_text(model, read_tensors(path), str(path))
        return cls(
            model.to(dtype=dtype).eval(), config, *load_tokenizer(tokenizer or folder / "tokenizer")
        )

    def save(self, folder: str | Path) -> None:
        """Write `text_encoder/` and `tokenizer/` as diffusers and transformers read them."""
        folder = Path(folder)
        write_json(self.config, folder / "text_encoder" / "config.json")
        tensors = {f"{PREFIX}{key}": tensor for key, tensor in self.model.state_dict().items()}
        save_tensors(tensors, folder / "text_encoder" / "model.safetensors")
        for name, content in self.tokenizer_files.items():
            with atomic_write(folder / "tokenizer" / name) as temporary:
                temporary.write_bytes(content)


def check_text(sentence: str) -> None:
    """Raise InputError unless the sentence is valid Unicode text."""
    try:
        sentence.encode()
    except UnicodeEncodeError:
        raise InputError(f"the instruction {sentence!a} is not valid Unicode text") from None


def load_tokenizer(folder: Path) -> tuple[CLIPTokenizerFast, dict[str, bytes]]:
    """The tokenizer of a folder, `tokenizer.json` or `vocab.json` + `merges.txt`, and its files."""
    paths = sorted(path for path in folder.glob("*.*") if path.suffix in (".json", ".txt"))
    files = {path.name: path.read_bytes() for path in paths}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        raise InputError(
            f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt, "
            f"found {', '.join(files) or 'nothing'}"
        )
    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True), files
    except Exception as error:  # its parsers raise errors of many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} holds no readable CLIP tokenizer: {reason}") from error


def bare(key: str) -> str:
    """The key of a text encoder's tensor without the published prefix."""
    return key.removeprefix(PREFIX)


def load_text(model: ClipText, tensors: Mapping[str, Tensor], where: str) -> None:
    """Make tensors under published keys the model's own; position ids are left out."""
    found = {bare(key): tensor for key, tensor in tensors.items()}
    found.pop(POSITION_IDS, None)
    load_strict(model, found, where)

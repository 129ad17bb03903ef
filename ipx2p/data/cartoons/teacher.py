"""Cartoon teachers: functions that turn photographs into cartoons of the same size (layer 2).

Three kinds, opened by `open_teacher`: the filter of `classical.py`, which needs no weights; the
network of `whitebox.py`; any program that `torch.export` wrote, so that every other network can
teach without being known here.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export import load as load_program
from torch.export.passes import move_to_device_pass

from ipx2p.data.cartoons import classical
from ipx2p.data.cartoons.whitebox import cartoonize, load_whitebox
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes
from ipx2p.images import RANGE_TOLERANCE
from ipx2p.tensor_files.tensors import digest

KNOWN = ("classical", "FILE.safetensors (White-box weights)", "FILE.pt2 (exported program)")
HOW_TO_EXPORT = (
    "export it with dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},) and an example (1, 3, H, W)"
)


class Teacher:
    """A function on pictures, which makes the examples to learn from.

    Args:
        name: the word or file by which it was opened.
        digest: another one where the pictures may be others: of the weights, of the program's
            file, or of the filter's version.
        function: (1, 3, H, W) in [0, 1] to the same, on `device`.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        function: Callable[[Tensor], Tensor],
        device: torch.device | str,
    ) -> None:
        self.name = name
        self.digest = digest
        self._function = function
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pixels01: Tensor) -> Tensor:
        """Photographs, float32 in [0, 1], (3, H, W) or (N, 3, H, W), to cartoons, shaped alike.

        One after the other, so that a picture does not depend on its batch. The result is on the
        device of the photographs.
        Raises: InputError for a wrong shape, dtype or range, of what goes in or of what comes out,
            and for a size that the teacher cannot take.
        """
        if pixels01.ndim not in (3, 4) or pixels01.shape[-3] != 3 or not pixels01.numel():
            found = tuple(pixels01.shape)
            raise InputError(f"teacher {self.name} takes (3, H, W) or (N, 3, H, W), not {found}")
        _check_range(pixels01, f"teacher {self.name} was given")
        pictures = pixels01.to(self._device).reshape(-1, 1, *pixels01.shape[-3:])
        cartoons = torch.cat([self._draw(picture) for picture in pictures])
        return cartoons.reshape(pixels01.shape).to(pixels01.device)

    def _draw(self, picture: Tensor) -> Tensor:
        cartoon = self._function(picture)
        if not isinstance(cartoon, Tensor) or cartoon.shape != picture.shape:
            found = _shape(cartoon) if isinstance(cartoon, Tensor) else type(cartoon).__name__
            raise InputError(
                f"teacher {self.name} made {found} of a picture {_shape(picture)}, expected a "
                "picture of the same shape: correct the program and export it again"
            )
        _check_range(cartoon, f"teacher {self.name} made")
        return cartoon.clamp(0, 1)  # takes away no more than a rounding, see above


def open_teacher(name: str, device: torch.device | str = "cpu") -> Teacher:
    """Open a teacher by a word or by its file.

    Args:
        name: `classical`; a .safetensors file that `prepare teacher` wrote; or a .pt2 file
            of `torch.export.save`: a program from one picture, float32 (1, 3, H, W) in [0, 1], to
            another. Opening a .pt2 file may run code from it, so open only those that you trust.
    Raises: InputError for another word, or for a file that is not what its suffix says.
    """
    if name == "classical":
        version = f"{name} {classical.VERSION}".encode()
        return Teacher(name, digest_bytes(version), classical.cartoonize, device)
    path = Path(name)
    if path.suffix == ".safetensors":
        generator = load_whitebox(path)
        held = digest(generator.state_dict())
        generator.to(device)
        return Teacher(name, held, lambda x: cartoonize(generator, x), device)
    if path.suffix == ".pt2":
        program = _Program(path, device)
        return Teacher(name, digest_bytes(path.read_bytes()), program, device)
    raise InputError(f"no teacher {name!r}; {suggestion(name, KNOWN)}")


class _Program:
    """A program of `torch.export` as a function on one picture.

    Raises: InputError if the file holds none, or one that does not take one picture.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        program = _read_program(path)
        inputs = program.graph_signature.user_inputs
        if len(inputs) != 1:
            raise InputError(f"{path} takes {len(inputs)} inputs, expected 1: {HOW_TO_EXPORT}")
        [given] = [node.meta["val"] for node in program.graph.nodes if node.name == inputs[0]]
        if not isinstance(given, Tensor) or given.ndim != 4 or given.dtype != torch.float32:
            found = f"{given.dtype} {_shape(given)}" if isinstance(given, Tensor) else repr(given)
            raise InputError(f"{path} takes {found}, expected torch.float32 (1, 3, H, W)")
        num, channels, *size = (side if type(side) is int else "any" for side in given.shape)
        if num not in (1, "any") or channels not in (3, "any"):
            raise InputError(
                f"{path} takes {_shape(given)}, expected (1, 3, H, W): {HOW_TO_EXPORT}"
            )
        self._path = path
        self._sizes = "{} x {}".format(*size)  # height x width
        self._module = move_to_device_pass(program, device).module()

    def __call__(self, picture: Tensor) -> Tensor:
        try:
            return self._module(picture)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            height, width = picture.shape[-2:]
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self._path} takes pictures of height x width {self._sizes}, and fails for "
                f"{height} x {width} ({reason}): {HOW_TO_EXPORT}, or cut the pictures to a size "
                "that it takes"
            ) from error


def _read_program(path: Path) -> ExportedProgram:
    try:
        with zipfile.ZipFile(path) as archive:
            kinds = [name for name in archive.namelist() if name.endswith("/archive_format")]
            if [archive.read(name) for name in kinds] != [b"pt2"]:
                raise ValueError("an archive of another kind")
        return load_program(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file raises as variously as its parts are read
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is not a program that torch.export.save wrote, or it is damaged ({reason})"
        ) from error


def _check_range(pixels01: Tensor, what: str) -> None:
    """Raise InputError for anything but float32 in [0, 1]."""
    if pixels01.dtype != torch.float32:
        raise InputError(f"{what} {pixels01.dtype}, expected torch.float32 in [0, 1]")
    low, high = pixels01.min().item(), pixels01.max().item()
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # NaN too
        raise InputError(f"{what} values in {low:.4g}..{high:.4g}, expected [0, 1]")


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"

"""Cartoon teachers: functions that turn photographs into cartoons of the same size (layer 2).

`open_teacher` opens three kinds: the filter in `classical.py`, which needs no weights; the network
in `whitebox.py`; and any program saved by `torch.export`, so that other networks need no code here.
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
from ipx2p.data.light import check_pixels01
from ipx2p.errors import InputError, suggestion
from ipx2p.files import digest_bytes
from ipx2p.tensor_files.tensors import digest

KNOWN = ("classical", "FILE.safetensors (White-box weights)", "FILE.pt2 (exported program)")
HOW_TO_EXPORT = (
    "export it with dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},) and an example (1, 3, H, W)"
)


class Teacher:
    """A function that makes the targets to learn from.

    Args:
        name: the word or file by which it was opened.
        digest: of the weights, the program's file or the filter's version.
        function: from (1, 3, H, W) in [0, 1] to the same, on `device`.
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
        """Cartoons of photographs, ([N,] 3, H, W), float32 in [0, 1], on their device.

        One by one, so that a result does not depend on the batch.
        Raises: InputError for a wrong shape, dtype or range of the input or the output, and for a
            size that the teacher cannot take.
        """
        check_pixels01(pixels01, f"teacher {self.name}")
        pictures = pixels01.to(self._device).reshape(-1, 1, *pixels01.shape[-3:])
        cartoons = torch.cat([self._draw(picture) for picture in pictures])
        return cartoons.reshape(pixels01.shape).to(pixels01.device)

    def _draw(self, picture: Tensor) -> Tensor:
        cartoon = self._function(picture)
        if not isinstance(cartoon, Tensor) or cartoon.shape != picture.shape:
            found = _shape(cartoon) if isinstance(cartoon, Tensor) else type(cartoon).__name__
            raise InputError(
                f"teacher {self.name} turned a picture {_shape(picture)} into {found}, expected "
                "the same shape: correct the program and export it again"
            )
        check_pixels01(cartoon, f"teacher {self.name}, its result")
        return cartoon.clamp(0, 1)  # removes only rounding errors, after the check


def open_teacher(name: str, device: torch.device | str = "cpu") -> Teacher:
    """Open a teacher by name or file.

    Args:
        name: `classical`; a .safetensors file written by `prepare teacher`; or a .pt2 file written
            by `torch.export.save`: a program from one picture, float32 (1, 3, H, W) in [0, 1], to
            another. Opening a .pt2 file may run code from it: open only files that you trust.
    Raises: InputError for any other name, or if a file is not what its suffix says.
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
    """A program saved by `torch.export`, as a function of one picture.

    Raises: InputError if the file is not such a program, or does not take one picture.
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
                f"{height} x {width} ({reason}): {HOW_TO_EXPORT}, or crop the pictures to a size "
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
    except Exception as error:  # a damaged file can raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} was not written by torch.export.save, or it is damaged ({reason})"
        ) from error


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"

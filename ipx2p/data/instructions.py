"""What to say for each task (layer 2)."""

from pathlib import Path

from ipx2p.errors import InputError, suggestion

POLICIES = ("per_step", "per_pair", "fixed")

# One sentence per task, those of "Instruction-tuning Stable Diffusion with InstructPix2Pix".
INSTRUCTIONS = {
    "denoise": "denoise the noisy image",
    "enhance": "enhance the low-light image",
}


def has_bank(task: str) -> bool:
    """Whether there are sentences for a task."""
    return task in INSTRUCTIONS


def bank(task: str) -> tuple[str, ...]:
    """The sentences for a task; the first is the one to say when there is to be only one."""
    if not has_bank(task):
        raise InputError(
            f"no bank of instructions for {task!r}; {suggestion(task, [*INSTRUCTIONS])}"
        )
    return (INSTRUCTIONS[task],)


def read_bank(path: str | Path) -> tuple[str, ...]:
    """The sentences of a text file, one a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the bank of instructions {path}: {error}") from error
    sentences = tuple(line.strip() for line in lines if line.strip())
    if not sentences:
        raise InputError(f"the bank of instructions {path} holds no sentences")
    return sentences

"""The benchmark: what it prints, what it leaves behind, and what it refuses."""

import re
import tempfile

import pytest

from ipx2p import bench
from ipx2p.cli import run_command
from tests.conftest import GOLDEN

TINY = ["train", "--weights", str(GOLDEN / "diffusers"), "--resolution", "32", "--device", "cpu"]
NUMBERS = r"\s+([\d.e+-]+)\s+([\d.e+-]+)\s+([\d.e+-]+)\s+([\d.]+)%\s+([\d.]+)\s+([\d.]+)%"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the benchmark in this process; returns exit code, standard output, standard error."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(*argv):
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: bench.main([*argv]))
        assert not [*tmp_path.glob("ipx2p-bench-*")]  # whatever was written is gone
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


def test_both_kinds_get_a_row_and_their_rates_a_ratio(run):
    argv = [*TINY, "--batch-size", "4", "--accumulate", "2", "--turns", "2", "--steps", "2"]
    code, out, _ = run(*argv)
    assert code == 0
    assert f"command: python -m ipx2p.bench {' '.join(argv)}" in out
    rates = []
    for kind in (r"pictures \(encoding each step\)", r"data\.cache"):
        [row] = re.findall(kind + NUMBERS, out)
        step_s, fastest_s, rate, _mfu, memory_gib, waiting = map(float, row)
        assert step_s >= fastest_s > 0 and memory_gib > 0 and 0 < waiting < 100
        assert rate == pytest.approx(4 / step_s, rel=1e-2)
        rates.append(rate)
    [ratio] = re.findall(r"samples/s with / without data\.cache: ([\d.]+)", out)
    assert float(ratio) == pytest.approx(rates[1] / rates[0], abs=0.02)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["edit"], "invalid choice: 'edit'"),
        ([*TINY, "--steps", "0"], "--steps is 0, expected 1 or more"),
        ([*TINY, "--turns", "-1"], "--turns is -1, expected 1 or more"),
        ([*TINY, "--batch-size", "0"], r"train\.batch_size is 0, expected 1 or more"),
        ([*TINY, "--accumulate", "2"], r"train\.batch_size is 1, expected a multiple of 2"),
        ([*TINY, "--resolution", "33"], r"data\.resolution is 33, expected a multiple"),
        ([*TINY, "--workers", "-1"], r"data\.workers is -1, expected a number that is 0 or more"),
        ([*TINY, "--precision", "float8"], r"train\.precision is 'float8'; .*known here: auto"),
        ([*TINY, "--device", "abacus"], "device 'abacus' is not available"),
        (["train", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_get_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1 and re.search(message, err), err

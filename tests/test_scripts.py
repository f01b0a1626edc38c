"""The commands in scripts/ run with -m from the repository; started by their path they say so, in one line."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["bench", "data", "study_queue", "walkthrough", "warm_start"])
def test_started_by_path_they_end_with_one_clear_line(name, tmp_path):
    for script, folder in ((f"scripts/{name}.py", ROOT), (ROOT / "scripts" / f"{name}.py", tmp_path)):
        done = subprocess.run([sys.executable, script, "--help"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == f"error: start this from the repository's folder as: python -m scripts.{name}\n"


@pytest.mark.parametrize("name", ["bench", "data", "study_queue", "walkthrough", "warm_start"])
def test_started_as_a_module_they_have_a_help_text(name):
    done = subprocess.run([sys.executable, "-m", f"scripts.{name}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: -m scripts.{name}" in done.stdout
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]     # torch for CUDA
    assert not said                             # no library's message, such as that of bitsandbytes at its import


@pytest.mark.parametrize("name", ["bench", "data", "study_queue", "walkthrough", "warm_start"])
def test_a_wrong_flag_is_one_line(name):
    command = [sys.executable, "-m", f"scripts.{name}", "--colour"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_walkthrough_shows_every_equation():
    """It asserts its own numbers: by hand and by the functions of training."""
    done = subprocess.run([sys.executable, "-m", "scripts.walkthrough"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"({number})" in done.stdout for number in range(1, 9))
    assert "Replayed: the token" in done.stdout and "mask 0" in done.stdout

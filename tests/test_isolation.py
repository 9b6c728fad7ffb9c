"""A native crash costs one test, which is named, and the test command fails."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# More crashes than the eight workers that pytest-xdist replaces unless the command says otherwise.
CRASHING = """
import os

import pytest


@pytest.mark.parametrize("number", range(20))
def test_number(number):
    if number % 2:
        os.abort()
"""


def test_the_test_command_survives_crashes(tmp_path):
    line = next(
        text for text in (ROOT / "Makefile").read_text().splitlines() if "-m pytest tests" in text
    )
    arguments = shlex.split(line)[2:]
    assert arguments[:2] == ["pytest", "tests"]
    (tmp_path / "test_crashing.py").write_text(CRASHING)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        *arguments[2:],
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(r"10 failed, 10 passed", done.stdout), done.stdout[-2000:]
    failed = set(re.findall(r"FAILED \S*test_number\[(\d+)\]", done.stdout))
    assert failed == {str(number) for number in range(1, 20, 2)}

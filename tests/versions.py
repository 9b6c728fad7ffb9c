"""Install a set of versions in a fresh environment and run the core of the test suite with it.

    python tests/versions.py oldest                   # the lower ends of the ranges in settings.ini
    python tests/versions.py newest                   # the newest versions that settings.ini allows
    python tests/versions.py tested --python python3.12   # constraints.txt, with another Python

Each run prints one row for the table in CONTRIBUTING.md. Environments are kept in `--folder` and used again.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE_TESTS = (
    "test_kernels.py",
    "test_norm.py",
    "test_gram.py",
    "test_precision.py",
    "test_convolution.py",
    "test_models.py",
    "test_training.py",
    "test_rate.py",
    "test_data.py",
    "test_foreign.py",
    "test_published.py",
    "test_search_space.py",
    "test_vision.py",
    "test_cli.py",
)
TOOLS = ("pytest>=8", "pytest-xdist>=3.5", "pytest-timeout>=2.3", "hypothesis>=6.100")
TORCH_PARTNERS = {"2.6": "0.21", "2.7": "0.22", "2.8": "0.23"}  # the torchvision made for a torch
SHOWN = ("torch", "torchvision", "numpy", "numba", "pandas", "matplotlib", "scipy", "spikingjelly")


def requirements() -> list[str]:
    """Return the requirements of the package from settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["requirements"].split()


def lowest(requirement: str) -> str:
    """Return a requirement with its lower end as the only version: `"torch>=2.4"` becomes `"torch==2.4.*"`."""
    found = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
    if not found:
        return requirement
    name, version = found.groups()
    return f"{name}=={version}.*" if version.count(".") < 2 else f"{name}=={version}"


def wanted(which: str) -> list[str]:
    """Return what pip is asked to install for a set of versions."""
    listed = requirements()
    if which == "newest":
        return ["torch", *listed, *TOOLS, "timm"]
    if which == "tested":
        return ["-c", str(ROOT / "constraints.txt"), *listed, *TOOLS, "timm"]
    oldest = [lowest(requirement) for requirement in listed]
    torch_version = next(
        re.search(r"==([0-9]+\.[0-9]+)", r).group(1) for r in oldest if r.startswith("torch==")
    )
    partner = TORCH_PARTNERS[torch_version]
    return [
        *(f"torchvision=={partner}.*" if r.startswith("torchvision") else r for r in oldest),
        *TOOLS,
        "timm==1.0.3",
    ]


def versions_in(python: Path) -> dict[str, str]:
    """Return the versions that an environment has."""
    said = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    pairs = (line.split("==") for line in said.stdout.splitlines() if "==" in line)
    return {name.lower(): version for name, version in pairs}


def main() -> int:
    """Install, run, and print the row of the table; the exit status is that of pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("oldest", "newest", "tested"))
    parser.add_argument("--python", default=sys.executable, help="the Python to test with")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where environments are made"
    )
    parser.add_argument("--tests", nargs="*", default=CORE_TESTS, help="test files, or `all`")
    options = parser.parse_args()

    number = subprocess.run(
        [options.python, "-V"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    place = Path(options.folder) / f"snnkd-{options.which}-{number}"
    python = place / "bin" / "python"
    if not python.exists():
        if Path(options.python).resolve() == Path(sys.executable).resolve():
            venv.create(place, with_pip=True)
        else:
            subprocess.run([options.python, "-m", "venv", place], check=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *wanted(options.which)], check=True)

    files = (
        ["tests"] if list(options.tests) == ["all"] else [f"tests/{name}" for name in options.tests]
    )
    existing = [name for name in files if (ROOT / name).exists()]
    command = [python, "-m", "pytest", "-q", "-n", "2", "--max-worker-restart", "1000", *existing]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}  # for processes that tests start
    done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True)
    print(done.stdout[-6000:])
    have = versions_in(python)
    outcome = done.stdout.strip().splitlines()[-1].strip("= ")
    versions = ", ".join(f"{name} {have.get(name, 'absent')}" for name in SHOWN)
    print(f"| {options.which} | {number} | {versions} | {outcome} |")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

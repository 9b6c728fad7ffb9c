"""Kernels forked for pages: each page has a fresh state, a death costs one page, and bytes are those of an ordinary kernel."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import has_ended, wait_for
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from snnkd_nb.core import atomic_write
from snnkd_nb.runner import workers
from snnkd_nb.runner.notebooks import clean_notebook, run_notebook
from snnkd_nb.runner.workers import SERVER, kernel_command, kernel_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
KERNELSPEC = {"display_name": "python3", "language": "python", "name": "python3"}


def page(path: Path, *sources: str) -> Path:
    """Write a notebook with one code cell per source."""
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {"tags": ["parameters"]} if i == 0 else {},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for i, source in enumerate(("scale = 'smoke'", *sources))
    ]
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": KERNELSPEC},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return atomic_write(path, json.dumps(notebook))


def printed(notebook: dict) -> str:
    """Return what all cells of an executed notebook wrote to standard output."""
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    return "".join(o["text"] for o in outputs if o.get("name") == "stdout")


@pytest.fixture(scope="module")
def address():
    """The socket of one kernel server for all tests of this file."""
    with kernel_server(MPLBACKEND="module://matplotlib_inline.backend_inline") as variables:
        yield variables[SERVER]


@pytest.fixture
def home(tmp_path, monkeypatch, address):
    """A project whose pages get their kernels from the server."""
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv(SERVER, address)
    return tmp_path


STATE = """
import os, sys, random
import matplotlib, numpy, pandas, torch
print(os.getppid())
print("leaked" in globals(), "LEAKED" in os.environ, hasattr(torch, "leaked"), "tabnanny" in sys.modules)
print(matplotlib.rcParams["lines.linewidth"], pandas.get_option("display.precision"))
print(torch.initial_seed(), os.environ["SNNKD_MISSING"], os.getcwd())
print(numpy.random.random(), random.random())
"""
CHANGE = """
import tabnanny
leaked = True
torch.leaked = True
os.environ["LEAKED"] = "1"
os.chdir("/")
matplotlib.rcParams["lines.linewidth"] = 9
pandas.set_option("display.precision", 3)
torch.manual_seed(5)
"""


def test_no_page_sees_the_state_of_another(home):
    path = page(home / "page.ipynb", STATE, CHANGE)
    first = printed(run_notebook(path, {})).splitlines()
    second = printed(run_notebook(path, {}, missing="error")).splitlines()
    assert first[0] == second[0], "both kernels are children of the server"
    assert first[1] == second[1] == "False False False False"
    assert first[2] == second[2] == "1.5 6"
    assert first[3].replace(" show ", " error ") == second[3]
    assert str(home) in second[3]
    for a, b in zip(first[4].split(), second[4].split(), strict=True):
        assert a != b, "unseeded random numbers differ from page to page"


def test_a_page_has_the_same_bytes_as_in_an_ordinary_kernel(home, monkeypatch):
    frame = "import pandas as pd\npd.DataFrame({f'column {i}': [i] for i in range(30)})"
    wide = "print(pd.DataFrame({f'a long name of column {i}': [i] for i in range(9)}))"
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3]);"
    numbers = "import torch\ntorch.manual_seed(0)\nprint(torch.randn(3), torch.get_num_threads())"
    path = page(home / "page.ipynb", frame, wide, figure, numbers)
    forked = run_notebook(path, {})
    monkeypatch.delenv(SERVER)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ordinary = run_notebook(path, {})
    assert clean_notebook(forked, {}) == clean_notebook(ordinary, {})
    assert "image/png" in json.dumps(forked)


@pytest.mark.parametrize("forked", [True, False])
def test_a_killed_kernel_costs_its_own_page_only(home, monkeypatch, forked):
    if not forked:
        monkeypatch.delenv(SERVER)
    deadly = page(home / "deadly.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeError, match="[Kk]ernel died"):
        run_notebook(deadly, {})
    fine = page(home / "fine.ipynb", "print('fine')")
    assert printed(run_notebook(fine, {})) == "fine\n"


def start_relay(home: Path) -> tuple[subprocess.Popen, int]:
    """Start a kernel by hand; returns the process of its relay and the process number of the kernel."""
    connection = str(home / "kernel.json")
    write_connection_file(connection, ip=str(home / "kernel"), transport="ipc")
    command = [part.format(connection_file=connection) for part in kernel_command()]
    relay = subprocess.Popen(command, cwd=home, stderr=subprocess.DEVNULL)

    def children() -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "cwd") == str(home) and int(entry.name) != relay.pid:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    wait_for(lambda: list(home.glob("kernel-*")) and children())
    return relay, children()[0]


def wait_until_ready(home: Path) -> None:
    """Wait until the kernel of `start_relay` answers."""
    client = BlockingKernelClient(connection_file=str(home / "kernel.json"))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
    finally:
        client.stop_channels()


def test_the_relay_ends_as_its_kernel_ends(home):
    relay, kernel = start_relay(home)
    os.kill(kernel, signal.SIGKILL)
    assert relay.wait(20) == -signal.SIGKILL


def test_a_kernel_does_not_outlive_its_relay(home):
    relay, kernel = start_relay(home)
    relay.kill()
    relay.wait(20)
    wait_for(lambda: has_ended(kernel))


def test_a_kernel_receives_the_signals_of_its_relay(home):
    relay, kernel = start_relay(home)
    wait_until_ready(home)  # before that, an interrupt ends a kernel
    relay.send_signal(signal.SIGINT)  # an idle kernel survives an interrupt
    time.sleep(0.5)
    assert relay.poll() is None and not has_ended(kernel)
    relay.terminate()
    relay.wait(20)
    wait_for(lambda: has_ended(kernel))


def test_without_a_server_kernels_are_ordinary_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PRELOADED", ())
    with kernel_server() as variables:
        monkeypatch.setenv(SERVER, variables[SERVER])
        relay, kernel = start_relay(tmp_path)
    assert relay.wait(20) != 0
    wait_for(lambda: has_ended(kernel))
    assert not Path(variables[SERVER]).exists()
    assert kernel_command()[1:3] == ["-m", "ipykernel_launcher"]


OWNER = """
import os, sys, time
from snnkd_nb.runner import workers

workers.PRELOADED = ()
with workers.kernel_server() as variables:
    print(variables[workers.SERVER], flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_kernels_end_when_the_process_that_started_the_server_ends(tmp_path, monkeypatch, how):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    monkeypatch.setenv(SERVER, owner.stdout.readline().strip())
    relay, kernel = start_relay(tmp_path)
    owner.send_signal(how)
    owner.wait(20)
    assert relay.wait(20) != 0
    wait_for(lambda: has_ended(kernel))

"""Freed memory is kept for the next tensors: fewer page faults, and the user's own settings win."""

import ctypes
import os
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import torch
from snnkd_nb.core import keep_freed_memory

def make_tensors(n):
    for _ in range(n):
        torch.ones(2**24)  # 64 MiB

is_kept = keep_freed_memory() if {is_asked} else False
make_tensors(30)  # until the pieces that small objects take from the freed blocks are stable
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make_tensors(8)
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2**24 * 4 // os.sysconf("SC_PAGE_SIZE")  # of one tensor
has_mallopt = hasattr(ctypes.CDLL(None), "mallopt")


def count_faults(is_asked, **environment):
    "Return whether memory is kept, and the page faults of eight tensors of 64 MiB."
    code = COUNT_FAULTS.format(is_asked=is_asked)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, **environment}
    )
    assert done.returncode == 0, done.stderr
    is_kept, faults = done.stdout.split()
    return is_kept == "True", int(faults)


@pytest.mark.skipif(not has_mallopt, reason="this C library has no mallopt")
def test_kept_memory_is_not_cleared_again_for_every_tensor():
    is_kept, faults = count_faults(True)
    assert is_kept
    assert faults < PAGES / 4  # less than a part of one tensor's pages, for eight tensors
    _, faults_before = count_faults(False)
    assert faults_before > 4 * faults


def test_a_user_who_tunes_malloc_is_left_alone():
    is_kept, _ = count_faults(True, MALLOC_MMAP_THRESHOLD_="1000000")
    assert not is_kept


def test_fit_keeps_freed_memory(monkeypatch):
    from snnkd_nb.data.images import load
    from snnkd_nb.models.zoo import create_model
    from snnkd_nb.training import loop

    calls = []
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: calls.append(True))
    student = create_model("resnet20", T=1, width=0.125, image_size=8, in_channels=1)
    loop.fit(student, load("digits"), epochs=1, batch_size=512, on_event=lambda event: None)
    assert calls == [True]

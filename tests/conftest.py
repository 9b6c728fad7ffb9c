"""Every test has its own cache; none touches the user's."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    before = dict(os.environ)
    os.environ["SNNKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.clear()
    os.environ.update(before)

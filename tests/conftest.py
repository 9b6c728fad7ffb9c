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


@pytest.fixture(scope="module")
def digits():
    from snnkd_nb.data.images import load

    return load("digits")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A store whose records no other module sees, in a project with a cache of its own."
    from snnkd_nb.store import Store

    top = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNNKD_CACHE", str(top / "cache"))
        patch.setenv("SNNKD_ROOT", str(top))
        yield Store(top / "runs")

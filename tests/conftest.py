"""Every test has its own cache; none touches the user's."""

import os
from types import ModuleType

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


_set_attribute = pytest.MonkeyPatch.setattr


def _refuse_old_names(self, target, name, *args, **kwargs):
    "Patch an attribute; a renamed one would be patched without effect, and the test pass always."
    if isinstance(target, ModuleType) and isinstance(name, str) and kwargs.get("raising", True):
        assert name in vars(target) or not target.__name__.startswith("snnkd_nb"), (
            f"{target.__name__} has no {name!r} of its own: patch today's name"
        )
    return _set_attribute(self, target, name, *args, **kwargs)


pytest.MonkeyPatch.setattr = _refuse_old_names


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

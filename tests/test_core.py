"""Old names and old module paths work for one more release."""

import importlib
import subprocess
import sys
import types

import pytest

import snnkd_nb
from snnkd_nb.core import renamed, renamed_arguments


def run_python(code):
    "Run code in a fresh process that shows every warning; return what it prints."
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_renamed_serves_a_name_of_the_same_module():
    module = types.ModuleType("snnkd_nb.example")
    sys.modules[module.__name__] = module
    try:
        module.new_name = object()
        module.__getattr__ = renamed(module.__name__, {"old_name": "new_name"})
        with pytest.warns(DeprecationWarning, match="is now snnkd_nb.example.new_name") as caught:
            assert module.old_name is module.new_name
        assert caught[0].filename == __file__
        with pytest.raises(AttributeError, match=r"'snnkd_nb\.example' has no attribute 'other'"):
            _ = module.other
    finally:
        del sys.modules[module.__name__]


def test_renamed_serves_a_name_of_another_module():
    names = {"short": "data.batches:cutout", "full": "snnkd_nb.data.batches:cutout"}
    get = renamed("snnkd_nb.example", names)
    cutout = importlib.import_module("snnkd_nb.data.batches").cutout
    for name in names:
        with pytest.warns(DeprecationWarning, match=r"is now snnkd_nb\.data\.batches\.cutout"):
            assert get(name) is cutout


def test_renamed_arguments():
    @renamed_arguments(old="new")
    def function(new, other=1):
        "Doc."
        return new, other

    assert function(2) == (2, 1)
    with pytest.warns(DeprecationWarning, match="'old' is now 'new'") as caught:
        assert function(old=3, other=4) == (3, 4)
    assert caught[0].filename == __file__
    assert function.__doc__ == "Doc."
    with pytest.raises(TypeError, match="'new' and its old name 'old'"):
        function(old=1, new=1)


def test_a_moved_module_is_the_module_at_its_new_path():
    out = run_python(
        "import snnkd_nb\n"
        "snnkd_nb.MOVED_MODULES.update({'data.gone': 'data.batches', 'lost.part': 'data.batches'})\n"
        "from snnkd_nb.data.gone import cutout\n"
        "from snnkd_nb.data import batches\n"
        "import snnkd_nb.data.gone, snnkd_nb.lost.part\n"
        "from snnkd_nb.lost import part\n"
        "assert part is batches is snnkd_nb.data.gone and cutout is batches.cutout\n"
        "assert batches.__name__ == batches.__spec__.name == 'snnkd_nb.data.batches'\n"
    )
    assert "snnkd_nb.data.gone is now snnkd_nb.data.batches; the old path goes" in out


def test_a_moved_module_without_its_new_module_does_not_exist():
    code = (
        "import snnkd_nb\n"
        "snnkd_nb.MOVED_MODULES['data.gone'] = 'data.nowhere'\n"
        "try:\n"
        "    import snnkd_nb.data.gone\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    assert "No module named 'snnkd_nb.data.gone'" in run_python(code)


def test_every_moved_module_can_be_imported():
    "At its old path or, when it was folded, as the module it was folded into."
    for old in snnkd_nb.MOVED_MODULES:
        assert importlib.util.find_spec(f"snnkd_nb.{old}") is not None, old


def test_importing_the_package_imports_nothing_heavy():
    out = run_python(
        "import sys, snnkd_nb; print({'torch', 'numpy', 'numba'} & sys.modules.keys())"
    )
    assert "set()" in out

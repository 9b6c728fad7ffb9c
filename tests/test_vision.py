"""The torchvision guard, both ways: beside its own torch and beside another build."""

import subprocess
import sys
import textwrap


def run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def test_where_torchvision_loads_the_guard_does_nothing():
    r = run("""
        import sys, types, importlib
        fake = types.ModuleType("torchvision"); fake.__path__ = []
        sys.modules["torchvision"] = fake
        from snnkd_nb import core
        assert core.torchvision() is fake and not core._libraries
    """)
    assert r.returncode == 0, r.stderr


def test_where_it_refuses_the_pure_python_parts_load():
    "A package that, like torchvision beside another torch, looks an operator up while it is imported."
    r = run("""
        import sys, tempfile, pathlib
        top = pathlib.Path(tempfile.mkdtemp()); pkg = top / "torchvision"; pkg.mkdir()
        (pkg / "__init__.py").write_text(
            "import torch\\n"
            "from torch.library import register_fake\\n"
            "from . import half\\n"
            "@register_fake('torchvision::nms')\\ndef _(d, s, t): return d\\n"
            "whole = True\\n")
        (pkg / "half.py").write_text("x = 1\\n")
        sys.path.insert(0, str(top))
        try: import torchvision
        except RuntimeError as e: print("refused:", e)
        else: raise SystemExit("the fake torchvision should refuse")
        [sys.modules.pop(m) for m in list(sys.modules) if m.startswith("torchvision")]
        from snnkd_nb.core import torchvision as guarded
        assert guarded().whole
        assert guarded("half").x == 1
    """)
    assert r.returncode == 0, r.stdout + r.stderr
    assert "torchvision::nms" in r.stdout


def test_another_error_is_not_swallowed():
    r = run("""
        import sys, tempfile, pathlib
        top = pathlib.Path(tempfile.mkdtemp()); (top / "torchvision.py").write_text("raise RuntimeError('something else')")
        sys.path.insert(0, str(top))
        from snnkd_nb.core import torchvision
        try: torchvision()
        except RuntimeError as e: assert str(e) == "something else"
        else: raise SystemExit("swallowed")
    """)
    assert r.returncode == 0, r.stderr


def test_the_installed_torchvision_gives_data_sets_transforms_and_models():
    r = run("""
        from snnkd_nb.core import torchvision
        torchvision("datasets").CIFAR10, torchvision("transforms.v2").AutoAugment, torchvision("models").resnet18
    """)
    assert r.returncode == 0, r.stderr

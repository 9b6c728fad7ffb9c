"Settings of the user's matplotlib, pandas, torch, Numba and IPython change neither bytes nor numbers."

import os
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import snnkd_nb
from snnkd_nb.data.images import load, load_spec, subset
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.zoo import create_model
from snnkd_nb.reports.figure import format_csv, format_png, save_table, use_style
from snnkd_nb.runner import notebooks
from snnkd_nb.spec import DataSpec
from snnkd_nb.training.loop import evaluate, fit

HOSTILE_MATPLOTLIB = [
    {"text.usetex": True},
    {"axes.facecolor": "black", "lines.linewidth": 9.0, "font.size": 20.0, "image.cmap": "gray"},
    {"savefig.bbox": "tight", "savefig.transparent": True, "savefig.pad_inches": 2.0},
    {"savefig.facecolor": "red", "figure.facecolor": "blue", "figure.autolayout": True},
    {"font.family": "monospace", "mathtext.fontset": "cm", "axes.formatter.use_locale": True},
    {
        "axes.prop_cycle": plt.cycler(color=["k"]),
        "axes.unicode_minus": False,
        "path.sketch": (1, 9, 9),
    },
]


def picture():
    use_style()
    fig, axes = plt.subplots(1, 2)
    axes[0].plot([-1.5, 0.0, 1234.5], label="$x^2$")
    axes[0].set(xlabel="steps", title="−1 to 1")
    axes[0].legend()
    axes[1].imshow(np.arange(4).reshape(2, 2))
    png = format_png(fig)
    plt.close(fig)
    return png


@pytest.fixture(scope="module")
def plain_picture():
    with matplotlib.rc_context():
        return picture()


@pytest.mark.parametrize("settings", HOSTILE_MATPLOTLIB)
def test_a_matplotlibrc_does_not_change_a_picture(plain_picture, settings):
    with matplotlib.rc_context(settings):
        assert picture() == plain_picture


def test_settings_for_saving_do_not_count_even_after_the_style(plain_picture):
    with matplotlib.rc_context():
        use_style()
        fig, ax = plt.subplots()
        ax.plot([0, 1])
        before = format_png(fig)
        plt.rcParams.update({"savefig.bbox": "tight", "savefig.facecolor": "red"})
        assert format_png(fig) == before
        plt.close(fig)


def test_a_font_that_only_some_machines_have_is_not_used():
    with matplotlib.rc_context():
        use_style()
        assert plt.rcParams["font.sans-serif"] == ["DejaVu Sans"]
        assert plt.rcParams["font.family"] == ["sans-serif"]


def test_pandas_options_do_not_change_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    frame = pd.DataFrame({"a": [1 / 3, None, 1e9], "text": ["x" * 200, "ä", None]})

    def files():
        path = save_table(frame, "sastc/table12", "a heading")
        return path.read_bytes(), path.with_suffix(".md").read_bytes(), format_csv(frame)

    before = files()
    hostile = ["display.precision", 1, "display.max_colwidth", 5, "display.max_rows", 1]
    hostile += ["display.float_format", "{:.0f}".format, "display.width", 10]
    with pd.option_context(*hostile):
        assert files() == before


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained():
    data = subset(load("digits"), 60)
    torch.manual_seed(0)
    size = {"in_channels": 1, "image_size": 8, "width": 0.25, "depth": 0.34}
    student = create_model("resnet20", 10, T=2, **size)
    teacher = create_model("resnet20", 10, **size)
    distiller = create_distiller("kd+feature", student, teacher)
    options = {"epochs": 1, "lr": 0.05, "batch_size": 20, "weak_teacher": "accept"}
    history = fit(student, data, distiller, on_event=len, **options)
    losses = [history[0][name] for name in ("loss", "ce", "kd", "feature", "test_acc")]
    return losses, evaluate(student, data), student.state_dict()


def test_torchs_default_type_does_not_change_a_training(double):
    torch.set_default_dtype(torch.float32)
    expected = trained()
    torch.set_default_dtype(torch.float64)
    found = trained()
    assert torch.get_default_dtype() == torch.float64
    assert found[:2] == expected[:2]
    for name, value in expected[2].items():
        assert value.dtype == found[2][name].dtype
        assert torch.equal(value, found[2][name]), name


def test_torchs_default_type_does_not_change_data(double):
    x, _ = next(iter(load("digits").loader("test", 5)))
    assert x.dtype == torch.float32
    assert load_spec(DataSpec("digits")).mean.dtype == torch.float32
    student = create_model("resnet20", 10, T=2, in_channels=1, image_size=8, width=0.1)
    assert student(x).dtype == torch.float32


@pytest.mark.parametrize("name", snnkd_nb.NUMBA_SETTINGS)
def test_numba_settings_that_change_numbers_are_ignored(monkeypatch, name):
    monkeypatch.setenv(name, "generic" if "CPU" in name else "1")
    with pytest.warns(UserWarning, match=f"{name} would change the numbers"):
        snnkd_nb.ignore_numba_settings()
    assert name not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snnkd_nb.ignore_numba_settings()


def test_numba_that_is_loaded_already_takes_its_defaults(monkeypatch):
    from numba.core import config

    assert not config.DISABLE_JIT
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    monkeypatch.setenv("NUMBA_OPT", "0")
    config.reload_config()
    assert config.DISABLE_JIT and config.OPT == 0
    with pytest.warns(UserWarning):
        snnkd_nb.ignore_numba_settings()
    assert not config.DISABLE_JIT and config.OPT == 3


def test_pages_run_without_the_users_start_up_files(monkeypatch):
    import papermill

    seen = {}

    def execute(*args, **options):
        seen.update(os.environ)
        return {"cells": []}

    monkeypatch.setenv("IPYTHONDIR", "/home/me/.ipython")
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    notebooks.run_notebook("page.ipynb", {})
    assert not seen["IPYTHONDIR"].startswith("/home/me")
    assert os.environ["IPYTHONDIR"] == "/home/me/.ipython"

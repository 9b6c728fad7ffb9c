"""Outputs that break, encodings of every kind, and file names that systems spell in other ways."""

import ast
import io
import os
import pwd
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import snnkd_nb
from snnkd_nb.cli import main
from snnkd_nb.core import (
    UserError,
    atomic_write,
    cache_dir,
    check_writable,
    data_dir,
    is_terminal,
    root,
)
from snnkd_nb.data.images import load
from snnkd_nb.runner.jobs import execute
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, SearchSpec, to_dict
from snnkd_nb.store import Record, Store, dump
from snnkd_nb.training.job import run_train
from snnkd_nb.training.loop import fit
from snnkd_nb.training.progress import ProgressPrinter, guard_listener

QUICK = RunSpec(
    DataSpec(subset=64), ModelSpec("vgg11_sastc", width=0.03125), OptimSpec(epochs=2, lr=0.01)
)
WORDS = ["train", "--student", "vgg11_sastc", "--T", "None", "--width", "0.03125", "--epochs", "1"]
WORDS += ["--subset", "64"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A project and a cache of their own."
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path / "project"))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SNNKD_DATA", str(tmp_path / "data"))
    return tmp_path


# --- reporting never ends a run -----------------------------------------------------------------


class OnlyWrite:
    "What some notebooks and log collectors put in the place of standard output."

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


class Broken:
    "A stream whose other end is gone."

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: False


def closed_stream():
    stream = io.StringIO()
    stream.close()
    return stream


def test_an_output_with_write_and_flush_alone_shows_every_epoch(home, monkeypatch):
    stream = OnlyWrite()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(WORDS) == 0
    assert "epoch   1/1" in stream.text and len(Store().ids()) == 1


@pytest.mark.parametrize(
    "stream",
    [
        None,
        closed_stream(),
        Broken(OSError(28, "No space left on device")),
        Broken(BrokenPipeError(32, "Broken pipe")),
        Broken(UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range")),
    ],
    ids=["none", "closed", "full", "pipe", "encoding"],
)
def test_a_training_goes_on_when_its_output_breaks(home, monkeypatch, stream):
    data = load("digits")
    net = snnkd_nb.models.zoo.create_model(
        "vgg11_sastc", in_channels=1, image_size=8, width=0.03125
    )
    monkeypatch.setattr(sys, "stdout", stream)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(net, data, epochs=2, batch_size=512, lr=0.01, device="cpu")
    dropped = [w for w in caught if "progress is no longer reported" in str(w.message)]
    assert len(history) == 2 and len(dropped) == (stream is not None)


def test_a_listener_that_fails_is_dropped_once_and_the_record_is_stored(home):
    calls = []

    def listen(event):
        calls.append(event["event"])
        raise AttributeError("no attribute 'isatty'")

    with pytest.warns(UserWarning, match="no longer reported"):
        record = run_train(QUICK, on_event=listen)
    assert calls == ["start"] and Store().get(QUICK).id == record.id


def test_an_exception_of_the_caller_still_stops_a_training():
    class Enough(Exception):
        pass

    for error in (Enough, KeyboardInterrupt, StopIteration, AssertionError):

        def stop(event, error=error):
            raise error

        with pytest.raises(error):
            guard_listener(stop)({"event": "epoch"})


STANDIN = """
from snnkd_nb.spec import RunSpec
from snnkd_nb.store import Record, Store

def train(spec, store, weights, emit):
    Store(store).put(Record(spec, {"acc_last": 90.0}, {}, {}, {}))
    return {"acc": 90.0, "seconds": 1.0}
"""


def test_workers_finish_when_the_lines_cannot_be_printed(home, monkeypatch):
    def print_line(line):
        raise OSError(5, "Input/output error")

    (home / "standin.py").write_text(STANDIN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.syspath_prepend(home)
    with pytest.warns(UserWarning, match="no longer reported"):
        outcome = execute([QUICK], 1, on_line=print_line, call="standin:train")
    assert outcome.ok and Store().get(QUICK)


CLOSED = """
import os, sys
from snnkd_nb.cli import main
main(["list", "dsas/table01"])
with open(sys.argv[1], "w", encoding="utf-8") as file:
    assert file.fileno() > 2
    for stream in (sys.stdout, sys.stderr):
        print("text", file=stream, flush=True)
    os.write(1, b"text")
"""


def test_streams_that_are_closed_from_the_start(home):
    path = home / "record"
    words = [sys.executable, "-c", CLOSED, str(path)]
    command = ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *words]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert path.read_bytes() == b"", "nothing was printed into a file"


def test_a_stand_in_is_no_terminal():
    for stream in (None, OnlyWrite(), closed_stream(), io.StringIO()):
        assert is_terminal(stream) is False
    ProgressPrinter(OnlyWrite())({"event": "other"})


# --- encodings ----------------------------------------------------------------------------------


def text_calls(path):
    "The lines of a file where text is read or written without an encoding."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in ("open", "read_text", "write_text"):
            continue
        owner = getattr(getattr(node.func, "value", None), "id", "")
        texts = [getattr(arg, "value", "") for arg in node.args]
        modes = [text for text in texts if isinstance(text, str) and 0 < len(text) < 4]
        is_binary = any("b" in mode for mode in modes) or owner in ("Image", "os")
        has_encoding = any(word.arg == "encoding" for word in node.keywords) or "utf-8" in texts
        if not is_binary and not has_encoding:
            yield node.lineno


def test_every_text_file_is_read_and_written_as_utf8():
    found = {}
    for path in Path(snnkd_nb.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8").splitlines()
        lines = [n for n in text_calls(path) if "/proc/" not in source[n - 1]]  # ASCII
        if lines:
            found[path.name] = lines
    assert not found


@pytest.fixture(scope="module")
def latin1(tmp_path_factory):
    "The environment of a user whose locale is en_US.ISO-8859-1."
    folder = tmp_path_factory.mktemp("locales")
    words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the system cannot compile a locale")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") or k == "PYTHONPATH"}
    return {**env, "LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "OMP_NUM_THREADS": "1"}


def run_python(env, *words):
    own = {name: value for name, value in os.environ.items() if name.startswith("SNNKD_")}
    words = [sys.executable, *words]
    return subprocess.run(words, env={**env, **own}, capture_output=True, timeout=120)


def test_help_in_a_latin1_locale(home, latin1):
    probe = run_python(latin1, "-c", "import locale; print(locale.getencoding())")
    assert probe.stdout.strip() == b"ISO-8859-1"
    for words in (["--help"], ["run", "--help"], ["list", "dsas/table01"]):
        result = run_python(latin1, "-m", "snnkd_nb.cli", *words)
        assert result.returncode == 0, result.stderr
        result.stdout.decode("latin-1")
    assert b"COMMAND ..." in run_python(latin1, "-m", "snnkd_nb.cli", "--help").stdout


def test_a_record_is_the_same_in_every_locale(home, latin1):
    spec = RunSpec(DataSpec("folder:Käfer"))
    record = Record(to_dict(spec), {"acc_last": 1.0}, {}, {"cpu": "β"}, {})
    atomic_write(Store().path(spec.id), dump(record))
    before = Store().path(spec.id).read_bytes()
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from snnkd_nb.spec import DataSpec, RunSpec\n"
        "from snnkd_nb.store import Store\n"
        "record = Store().get(RunSpec(DataSpec('folder:K\\xe4fer')))\n"
        "Store().put(record, replace=True)\n"
    )
    result = run_python(latin1, "-c", code)
    assert result.returncode == 0, result.stderr.decode()
    assert Store().path(spec.id).read_bytes() == before


# --- names of classes and folders ---------------------------------------------------------------


def write_images(folder, classes, splits=("train", "test")):
    for split in splits:
        for number, name in enumerate(classes):
            place = os.path.join(os.fsencode(folder), split.encode(), os.fsencode(name))
            os.makedirs(place)
            for i in range(4):
                pixels = np.full((4, 4, 3), 60 * number + i, np.uint8)
                with open(os.path.join(place, b"%d.png" % i), "wb") as file:
                    Image.fromarray(pixels).save(file, format="png")


def test_a_class_folder_that_is_not_utf8(home):
    write_images(home / "data/set", [b"K\xe4fer", b"ant"])
    data = load("folder:set")
    assert data.classes == [r"K\xe4fer", "ant"] and len(data.train) == 8
    assert load("folder:set").fingerprint == data.fingerprint
    stream = load("imagefolder-stream:set", size=4, workers=0)
    _, y = next(iter(stream.loader("train", 8, shuffle=False)))
    assert y.tolist() == [0] * 4 + [1] * 4 and len(stream.fingerprint) == 16
    with pytest.raises(UserError, match=r"not UTF-8.*rename"):
        DataSpec("folder:K\udce4fer")
    with pytest.raises(UserError, match=r"not UTF-8"):
        RunSpec(DataSpec(args={"path": "K\udce4fer"}))


def test_an_unreadable_image_with_such_a_name_is_told(home, capsys):
    write_images(home / "data/set", [b"K\xe4fer"])
    with open(os.fsencode(home / "data/set/train") + b"/K\xe4fer/0.png", "wb") as file:
        file.write(b"no image")
    assert main([*WORDS, "--dataset", "folder:set"]) == 2
    assert r"K\xe4fer/0.png" in capsys.readouterr().err


def test_two_spellings_of_a_class_are_one(home):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    assert composed != decomposed
    write_images(home / "data/set", [composed, "ant"], ["train"])
    write_images(home / "data/set", [decomposed, "ant"], ["test"])
    data = load("folder:set")
    assert data.classes == [composed, "ant"] and len(data.test) == 8
    write_images(home / "data/both", [composed, decomposed])
    with pytest.raises(UserError, match="two folders of the class 'Käfer'.*NFC and NFD"):
        load("folder:both")


# --- links, homes, long names -------------------------------------------------------------------


def test_links_to_nothing_and_links_that_go_round(home):
    write_images(home / "data/set", ["ant", "bee"])
    train = home / "data/set/train"
    for link in (train / "cat", train / "ant/more", train / "ant/9.png"):
        link.symlink_to(home / "missing")
        with pytest.raises(UserError, match=f"{link} is a link to .*missing, which does not exist"):
            load("folder:set")
        link.unlink()
    for link, target in ((train / "ant/up", train / "ant"), (train / "ant/up", train)):
        link.symlink_to(target)
        with pytest.raises(UserError, match="link to a folder that contains it"):
            load("folder:set")
        link.unlink()
    (train / "self").symlink_to(train / "self")
    with pytest.raises(UserError, match="self"):
        load("folder:set")
    (train / "self").unlink()
    (home / "elsewhere").mkdir()
    (train / "ant/0.png").rename(home / "elsewhere/0.png")
    (train / "ant/linked").symlink_to(home / "elsewhere")
    assert len(load("folder:set").train) == 8, "a link to another place is followed"


def test_without_a_home_the_error_names_the_variable(monkeypatch):
    def no_user(uid):
        raise KeyError(uid)

    for name in ("HOME", "SNNKD_CACHE", "SNNKD_DATA", "SNNKD_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_user)
    monkeypatch.chdir("/")
    monkeypatch.setattr("snnkd_nb.core._is_root", lambda folder: False)
    for function, name in (
        (cache_dir, "SNNKD_CACHE"),
        (data_dir, "SNNKD_CACHE"),
        (root, "SNNKD_ROOT"),
    ):
        with pytest.raises(UserError, match=f"no home directory: set {name}, or HOME"):
            function()
    monkeypatch.setenv("SNNKD_CACHE", "~/cache")
    with pytest.raises(UserError, match="set HOME"):
        cache_dir()
    monkeypatch.setenv("SNNKD_CACHE", "/some/cache")
    assert data_dir() == Path("/some/cache/data")


def test_a_long_folder_name_gives_an_id_that_files_can_have(home):
    name = "folder:/" + "/".join(["a" * 120] * 2) + "/" + "b" * 250
    for spec in (RunSpec(DataSpec(name)), RunSpec(DataSpec(name), seed=1)):
        assert len(spec.id) == 210
        atomic_write(home / f"{spec.id}.123456789012.safetensors", b"")
    assert RunSpec(DataSpec(name)).id != RunSpec(DataSpec(name + "c")).id
    short = RunSpec(DataSpec("folder:" + "c" * 150))
    assert f"{'c' * 150}-resnet20-ann-s0-" in short.id
    search = SearchSpec(DataSpec(name), RunSpec(DataSpec(name)))
    assert len(search.id) < 211


def test_a_place_that_cannot_be_written_is_found_before_the_training(home):
    (home / "project/results").mkdir(parents=True)
    (home / "project/results/runs").write_text("not a folder", encoding="utf-8")
    events = []
    with pytest.raises(UserError, match="cannot write .*results/runs"):
        run_train(QUICK, on_event=events.append)
    assert events == []
    with pytest.raises(UserError, match="File name too long"):
        check_writable(home / ("x" * 256))
    check_writable(home / ("x" * 255))
    assert not list(home.glob("*x*")), "the check leaves nothing behind"


def test_the_longest_name_can_be_written(tmp_path):
    path = atomic_write(tmp_path / ("ä" * 127), "text")
    assert path.read_text(encoding="utf-8") == "text" and len(os.listdir(tmp_path)) == 1

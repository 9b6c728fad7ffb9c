"""What may go wrong while runs are made: kills, two at once, damaged files, numbers that blow up, full disks."""

import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from helpers import has_ended, run_command, wait_for

from snnkd_nb.cli import main
from snnkd_nb.core import atomic_write
from snnkd_nb.runner.jobs import execute, plan, progress_folder
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, to_dict
from snnkd_nb.store import Store, weights_path

DATA, OPTIM = DataSpec(subset=256), OptimSpec(epochs=8, batch_size=64, lr=0.02)
TEACHER = RunSpec(DATA, ModelSpec("vgg11_sastc", width=0.0625), OPTIM.replace(epochs=4))
STUDENT = RunSpec(
    DATA, ModelSpec("vgg11_sastc", T=2, width=0.0625), OPTIM, method="kd", teacher=TEACHER
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A project and a cache of their own."
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path / "project"))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


# --- training ---------------------------------------------------------------------------------------------------------

ZYGOTE = """
import json, os, pathlib, random, signal, sys, time
import safetensors.torch, torch
from accelerate import Accelerator
from snnkd_nb.data.images import load_spec
from snnkd_nb.spec import RunSpec
from snnkd_nb.store import Store
from snnkd_nb.training.job import build_model, run_train

top, spec = sys.argv[1], RunSpec.from_dict(json.loads(sys.argv[2]))
data = load_spec(spec.data)  # what costs time once is done before the forks
Accelerator(cpu=True), torch.optim.SGD([torch.zeros(1)], 0.1)
with torch.no_grad(): build_model(spec.model, data)(next(iter(data.loader("test", 8)))[0])

def start(place, ready=True):
    os.environ["SNNKD_ROOT"], os.environ["SNNKD_CACHE"] = f"{top}/{place}/project", f"{top}/{place}/cache"
    pid = os.fork()
    if pid: return pid
    try: run_train(spec, weak_teacher="accept")
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert end(start("warm")) == 0
t0 = time.perf_counter()
assert end(start("whole")) == 0
whole = time.perf_counter() - t0
def epochs(place):
    logs = pathlib.Path(top, place, "project/results/progress").glob("*.jsonl")
    return sum(log.read_text().count('"event": "epoch"') for log in logs)

moments, killed = random.Random(0), 0
total = epochs("whole")
for i in range(10):
    pid, seen = start(f"killed{i}"), moments.randrange(total - 1)
    while epochs(f"killed{i}") < seen: time.sleep(0.002)
    time.sleep(moments.uniform(0, whole / total))  # anywhere within the epoch that follows
    os.kill(pid, signal.SIGKILL)
    killed += end(pid) == -signal.SIGKILL
    assert end(start(f"killed{i}")) == 0
both = [start("two"), start("two")]
assert [end(p) for p in both] == [0, 0]
print(json.dumps({"killed": killed, "seconds": whole}))
"""


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory):
    "One undisturbed run, ten that were killed at a random moment and started again, and one that two processes wanted."
    top = tmp_path_factory.mktemp("kills")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    r = subprocess.run(
        [sys.executable, "-c", ZYGOTE, top, STUDENT.canonical()],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return top, json.loads(r.stdout.splitlines()[-1])


def record_of(top, place, spec):
    return Store(top / place / "project/results/runs").get(spec)


def numbers(record):
    timeless = {k: v for k, v in record.history.items() if "seconds" not in k}
    return {
        "weights": record.weights,
        "metrics": record.metrics,
        "history": timeless,
        "teacher": record.teacher,
        "dataset": record.dataset,
    }


@pytest.mark.parametrize("spec", [TEACHER, STUDENT], ids=["teacher", "student"])
def test_killed_at_ten_moments_every_run_ends_with_the_same_bits(aftermath, spec):
    top, facts = aftermath
    assert facts["killed"] >= 8, facts
    whole = numbers(record_of(top, "whole", spec))
    for i in range(10):
        assert numbers(record_of(top, f"killed{i}", spec)) == whole, f"killed{i}"


def test_a_kill_costs_the_current_epoch_at_most(aftermath):
    top, _ = aftermath
    resumed = 0
    for i in range(10):
        for spec in (TEACHER, STUDENT):
            log = (
                (top / f"killed{i}/project/results/progress/{spec.id}.jsonl")
                .read_text()
                .splitlines()
            )
            events = [json.loads(line) for line in log if line.endswith("}")]
            epochs = [e["epoch"] for e in events if e["event"] == "epoch"]
            assert epochs == sorted(set(epochs)), "an epoch was trained again"
            # the checkpoint is written before the line of the log: a kill between the two costs that line and nothing else
            assert len(epochs) >= spec.optim.epochs - 1 and record_of(
                top, f"killed{i}", spec
            ).history["epoch"] == [*range(1, spec.optim.epochs + 1)]
            resumed += sum(e["event"] == "start" for e in events) == 2 and len(epochs) > 1
    assert resumed >= 5, "too few kills fell into the training"


def test_a_kill_leaves_no_litter_that_is_mistaken_for_a_result(aftermath):
    top, _ = aftermath
    for i in range(10):
        assert Store(top / f"killed{i}/project/results/runs").ids() == sorted(
            [TEACHER.id, STUDENT.id]
        )
        assert not list((top / f"killed{i}/cache/checkpoints").glob("*.ckpt"))


def test_two_processes_asked_for_the_same_run_train_it_once(aftermath):
    top, _ = aftermath
    for spec in (TEACHER, STUDENT):
        log = (top / f"two/project/results/progress/{spec.id}.jsonl").read_text().splitlines()
        events = [json.loads(line)["event"] for line in log]
        assert (
            events.count("start") == events.count("done") == 1
            and events.count("epoch") == spec.optim.epochs
        )
    assert numbers(record_of(top, "two", STUDENT)) == numbers(record_of(top, "whole", STUDENT))


# --- damaged files ----------------------------------------------------------------------------------------------------

SHORT = OPTIM.replace(epochs=1)
SHORT_TEACHER = TEACHER.replace(optim=SHORT, model=ModelSpec("vgg11_sastc", width=0.03125))
SHORT_STUDENT = SHORT_TEACHER.replace(method="kd", teacher=SHORT_TEACHER, seed=1)


def trained(spec, **kw):
    "What is trained when a run is asked for: ids, in order."
    from snnkd_nb.training.job import run_train

    events = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record = run_train(spec, Store(), events.append, weak_teacher="accept", **kw)
    return (
        record,
        [e["id"] for e in events if e["event"] == "done"],
        " ".join(str(w.message) for w in said),
    )


def test_truncated_records_and_flipped_bytes_are_found_and_redone(home):
    record, done, _ = trained(SHORT_STUDENT)
    assert done == [SHORT_TEACHER.id, SHORT_STUDENT.id]
    path = Store().path(SHORT_STUDENT.id)
    text = path.read_text()
    for damage in (text[: len(text) // 2], "", text.replace('"acc_last": ', '"acc_last": 1')):
        path.write_text(damage)
        with pytest.warns(UserWarning, match="damaged"):
            assert [j.state for j in plan([SHORT_STUDENT]) if j.spec == SHORT_STUDENT] == ["needed"]
        again, done, said = trained(SHORT_STUDENT)
        assert (
            done == [SHORT_STUDENT.id] and "damaged" in said and numbers(again) == numbers(record)
        )

    weights = weights_path(Store().get(SHORT_TEACHER))
    good = bytearray(weights.read_bytes())
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    other = SHORT_STUDENT.replace(seed=2)
    assert [(j.spec, j.state) for j in plan([other])] == [
        (SHORT_TEACHER, "needed"),
        (other, "needed"),
    ]
    _, done, said = trained(other)
    assert (
        done == [SHORT_TEACHER.id, other.id]
        and "damaged" in said
        and weights.read_bytes() == bytes(good)
    )


def test_a_damaged_checkpoint_is_not_used(home):
    record, _, _ = trained(SHORT_TEACHER)
    Store().path(record.id).unlink()
    checkpoint = home / "cache/checkpoints" / f"{record.id}.ckpt"
    atomic_write(checkpoint, b"0" * 64 + b"\n" + b"no tensors")
    again, done, said = trained(SHORT_TEACHER)
    assert done == [record.id] and "damaged" in said and numbers(again) == numbers(record)


def test_a_loss_that_blows_up_is_told_in_one_line_and_leaves_no_record(home, capsys):
    bad = SHORT_TEACHER.replace(optim=SHORT.replace(lr=1e30))
    lines = []
    out = execute([bad], 1, on_line=lines.append)
    assert (
        not out.ok
        and "NonFiniteLoss" in out.failed[bad.id]
        and "step" in out.failed[bad.id]
        and len(lines) == 2
    )
    assert "Traceback" in (progress_folder() / f"{bad.id}.log").read_text() and Store().ids() == []
    assert (
        main(
            [
                "train",
                "--student",
                "vgg11_sastc",
                "--T",
                "None",
                "--width",
                "0.03125",
                "--epochs",
                "1",
                "--lr",
                "1e30",
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "loss term" in err and Store().ids() == []


# --- the executor -----------------------------------------------------------------------------------------------------

STANDIN = """
import os, time
from pathlib import Path
from snnkd_nb.core import lock
from snnkd_nb.spec import RunSpec
from snnkd_nb.store import Record, Store

def train(spec, store, weights, emit):
    run, store, t0 = RunSpec.from_dict(spec), Store(store), time.perf_counter()
    with lock(store.path(run.id)):
        if not store.get(run):
            with open(store.folder / f"{run.id}.pids", "a") as f: f.write(f"{os.getpid()}\\n")
            while (store.folder / "wait").exists(): time.sleep(0.02)
            store.put(Record(spec, {"acc_last": 90.0}, {}, {}, {}))
    return {"acc": 90.0, "seconds": time.perf_counter() - t0}
"""

COMMAND = """
import json, sys
from snnkd_nb.runner.jobs import execute
from snnkd_nb.spec import RunSpec
from snnkd_nb.store import Store
specs = [RunSpec.from_dict(d) for d in json.loads(sys.argv[1])]
try: sys.exit(not execute(specs, 2, Store(sys.argv[2]), call="standin:train").ok)
except KeyboardInterrupt as e: print(e); sys.exit(130)
"""


@pytest.fixture
def standin(home):
    (home / "standin.py").write_text(STANDIN)
    (home / "runs").mkdir()
    return home


def command(home, specs):
    args = [sys.executable, "-c", COMMAND, json.dumps([to_dict(s) for s in specs]), home / "runs"]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pids(home, spec):
    path = home / "runs" / f"{spec.id}.pids"
    return [int(p) for p in path.read_text().split()] if path.exists() else []


SEEDS = [RunSpec(seed=s) for s in range(3)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_when_the_parent_ends_its_workers_end_and_the_next_start_finishes(standin, how):
    (standin / "runs/wait").touch()
    parent = command(standin, SEEDS)
    wait_for(lambda: all(pids(standin, s) for s in SEEDS[:2]))
    workers = [p for s in SEEDS for p in pids(standin, s)]
    parent.send_signal(how)
    out = parent.communicate(timeout=20)[0]
    wait_for(lambda: all(map(has_ended, workers)))
    if how == signal.SIGINT:
        assert (
            parent.returncode == 130
            and "finished epochs are kept" in out
            and "Traceback" not in out
        )
    (standin / "runs/wait").unlink()
    again = command(standin, SEEDS)
    assert "[3/3]" in again.communicate(timeout=60)[0] and again.returncode == 0


def test_a_killed_worker_is_replaced_and_told(standin):
    (standin / "runs/wait").touch()
    parent = command(standin, SEEDS[:1])
    wait_for(lambda: pids(standin, SEEDS[0]))
    os.kill(pids(standin, SEEDS[0])[0], signal.SIGKILL)
    wait_for(lambda: len(pids(standin, SEEDS[0])) == 2)
    (standin / "runs/wait").unlink()
    out = parent.communicate(timeout=60)[0]
    assert parent.returncode == 0 and "killed by SIGKILL" in out and "tried once more" in out


def test_a_run_whose_worker_dies_twice_is_given_up_and_the_others_are_made(standin):
    (standin / "runs/wait").touch()
    parent = command(standin, SEEDS[:2])
    wait_for(lambda: all(pids(standin, s) for s in SEEDS[:2]))
    for i in range(2):
        wait_for(lambda: len(pids(standin, SEEDS[0])) == i + 1)
        os.kill(pids(standin, SEEDS[0])[i], signal.SIGKILL)
    (standin / "runs/wait").unlink()
    out = parent.communicate(timeout=60)[0]
    assert (
        parent.returncode == 1
        and "its worker died twice" in out
        and "1 of 2 runs done · 1 failed" in out
    )
    assert Store(standin / "runs").ids() == [SEEDS[1].id]


def test_two_executors_asked_for_the_same_runs_make_each_once(standin):
    both = [command(standin, SEEDS) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert [len(pids(standin, s)) for s in SEEDS] == [1, 1, 1]


# --- places that cannot be written ------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_nothing_half_written(home):
    def small_files():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    words = (
        "train",
        "--student",
        "vgg11_sastc",
        "--T",
        "None",
        "--width",
        "0.0625",
        "--epochs",
        "1",
        "--subset",
        "64",
    )
    assert main([*words, "--seed", "1"]) == 0, "the images are decoded"
    before = sorted(home.rglob("*"))
    r = run_command(*words, prepare=small_files, PYTHONDONTWRITEBYTECODE="1")
    assert (
        r.returncode == 1
        and r.stderr.startswith("snnkd: ")
        and r.stderr.count("\n") == 1
        and "File too large" in r.stderr
    ), r.stderr
    new = {p for p in home.rglob("*") if p.is_file()} - set(before)
    assert {p.suffix for p in new} <= {".lock", ".jsonl"}, new
    assert main(words) == 0, "with room it goes on"


def test_a_place_that_cannot_be_written_is_one_line(home):
    (home / "project").write_text("not a folder")
    r = run_command("status")
    assert (
        r.returncode == 1
        and r.stderr.startswith("snnkd: cannot use ")
        and r.stderr.count("\n") == 1
    ), r.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_project_is_one_line(home):
    (home / "project").mkdir(mode=0o555)
    r = run_command("status")
    assert r.returncode == 1 and "Permission denied" in r.stderr and r.stderr.count("\n") == 1

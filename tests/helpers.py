"""What several test files use."""

import os
import subprocess
import sys
import textwrap
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from snnkd_nb.cli import main
from snnkd_nb.models.zoo import create_model, model_info

GOLDEN = Path(__file__).parent / "golden"


# small things


def quiet(event):
    "Take an event of a training and print nothing."


def check_one_line(error, *parts):
    "Check that an error has one line with these parts."
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def load_golden(name):
    "Return the tensors of a file in tests/golden, by name."
    arrays = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


def draw_events(n=300, size=128, seed=0, last=10**6):
    "Draw `n` events of a camera with `size` × `size` pixels."
    bits = np.random.default_rng(seed)
    return {
        "t": np.sort(bits.integers(0, last, n)),
        "x": bits.integers(0, size, n),
        "y": bits.integers(0, size, n),
        "p": bits.integers(0, 2, n),
    }


# processes and commands


def has_ended(pid):
    "Return whether a process is gone or waits for its parent."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=20.0):
    "Wait until a condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def run_python(code, *flags):
    "Run code in a fresh process and return what it prints."
    words = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(*words, timeout=400, prepare=None, **env):
    "Run `snnkd` in a fresh process on one thread; `prepare` is called in it first."
    return subprocess.run(
        [sys.executable, "-m", "snnkd_nb.cli", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=prepare,
    )


def error_of(capsys, *words):
    "Return the one line on stderr of a command of `snnkd` that must end with code 2."
    code = main([*words])
    out = capsys.readouterr()
    assert code == 2, (words, code, out)
    assert out.err.startswith("snnkd: "), out.err
    assert out.err.count("\n") == 1, out.err
    return out.err


# networks and runs

SHAPES = {  # classes, pixels per edge, channels
    "cifar10": (10, 32, 3),
    "cifar100": (100, 32, 3),
    "imagefolder-stream": (1000, 224, 3),
    "tiny-imagenet": (200, 64, 3),
    "cifar10-dvs": (10, 48, 2),
    "dvs-gesture": (11, 64, 2),
}
OURS = {  # pretrained networks of others -> the same architecture with a width
    "timm:resnet34": "resnet34_imagenet",
    "timm:resnet50": "resnet50_imagenet",
    "torchvision:resnet18": "resnet18_imagenet",
    "torchvision:resnet34": "resnet34_imagenet",
}


def shape_of(data):
    "Return classes, pixels per edge and channels of a data set of the papers."
    return SHAPES[data.name.partition(":")[0]]


def create_small(name="resnet20", T=None, width=0.125, **options):
    "Create a narrow network for the digits."
    return create_model(name, T=T, width=width, in_channels=1, image_size=8, **options)


@lru_cache
def create_on_meta(model, num_classes, size, channels):
    "Create the network of a spec at full size; nothing is downloaded, no memory is taken."
    args = {name: value for name, value in model.args.items() if name != "pretrained"}
    with torch.device("meta"):
        return create_model(
            model.name,
            num_classes,
            T=model.T,
            neuron=model.neuron,
            width=model.width,
            in_channels=channels,
            image_size=size,
            **args,
        )


def create_narrow(model, num_classes, channels, **options):
    "Create a spec's network with an eighth of its width and few blocks, for 32 × 32 pixels."
    name = OURS.get(model.name, model.name)
    known = model_info(name)["options"]
    if name == "spikingformer":
        options |= {"blocks": 2, "heads": 4}
    elif name == "vit_small":
        options |= {"blocks": 2, "patch": 8}
    elif "depth" in known:
        options |= {"depth": 0.2}
    if "stem" in known:
        options["stem"] = "small"
    sizes = {"in_channels": channels, "image_size": 32}
    return create_model(name, num_classes, width=0.125, **sizes, **options)


def shorten(spec, images=200, epochs=1, **optim):
    "Return the same run, teacher and reference for a few epochs of a few images."
    others = {name: getattr(spec, name) for name in ("teacher", "reference")}
    shorter = {
        name: shorten(other, images, epochs, **optim) for name, other in others.items() if other
    }
    return spec.replace(
        data=spec.data.replace(subset=images),
        optim=spec.optim.replace(epochs=epochs, **optim),
        **shorter,
    )

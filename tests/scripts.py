"""Scripts as fresh processes that need not import the packages of others again."""

import builtins
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

PRELOADED = (
    "torch",
    "numba",
    "pandas",
    "matplotlib.pyplot",
    "scipy.stats",
    "sklearn.datasets",
    "seaborn",
    "safetensors.torch",
    "spikingjelly.activation_based.layer",
    "PIL.Image",
)


class ScriptServer:
    """Run scripts as fresh processes that need not import the packages of others again.

    The scripts are forks of a process that has imported `PRELOADED`, and nothing of this project.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(
        self,
        script: Path,
        cwd: Path,
        output: Path,  # file for what the script writes to standard output and error
        env: dict[str, str],  # the whole environment
        timeout: float = 300,
    ) -> int:
        """Run a script and return its exit status, negative after a signal."""
        request = {"script": str(script), "cwd": str(cwd), "output": str(output), "env": env}
        request["timeout"] = timeout
        self.process.stdin.write(json.dumps(request) + "\n")
        answer = self.process.stdout.readline()
        assert answer, "the process that forks the scripts has died"
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def wait_for_end(pid: int, timeout: float) -> int:
    """Return the exit status of a child, which is killed after `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve_scripts() -> dict:
    """Answer requests until the input ends; return the request in each child."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        print(json.dumps(wait_for_end(pid, request["timeout"])), flush=True)
    sys.exit()


def run_script(request: dict) -> None:
    """Turn this process into one that was started with the script."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["script"]]
    sys.path[0] = str(Path(request["script"]).parent)
    main = ModuleType("__main__")
    main.__file__ = request["script"]
    main.__builtins__ = builtins
    sys.modules["__main__"] = main
    source = Path(request["script"]).read_text()
    exec(compile(source, request["script"], "exec"), main.__dict__)


if __name__ == "__main__":
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no fork looks through the objects of the packages again
    run_script(serve_scripts())

"""Runs a script in a fork of a process that is warm: importing what scripts do takes longer than most tests."""

import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])


def warm_up():
    """Waits until scripts start at once: what a fork finds imported is imported before the first."""
    first = FORKS.Process(target=int)
    first.start()
    first.join()


def become(command, cwd, out, err, environment, largest_file):
    """Makes this process the script: `command` is a file or "-m" and a module, and its options. What it starts is of
    its own group."""
    os.setsid()
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(cwd)
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if command[0] == "-m":
        module, *options = command[1:]
        sys.argv = [module, *options]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path[0] = str(Path(cwd, command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


def start(command, cwd, out, err, environment=(), largest_file=None):
    """The process of `python *command`, started: what it prints goes to the files `out` and `err`.

    Args:
        environment: {name: value} beside that of this process. largest_file: in bytes, all that one may hold.
    """
    Path(out).touch(), Path(err).touch()
    process = FORKS.Process(
        target=become, args=(command, str(cwd), str(out), str(err), dict(environment), largest_file)
    )
    process.start()
    return process


def free_port():
    """The number of a port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(command, cwd, timeout, largest_file=None):
    """(exit code, stdout, stderr) of `python *command`; a TimeoutError where it takes longer than `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = start(command, cwd, out, err, largest_file=largest_file)
        process.join(timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"{command} takes more than {timeout} s\n{out.read_text()}\n{err.read_text()}")
        return process.exitcode, out.read_text(), err.read_text()

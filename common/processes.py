"""Processes and seeds: the Accelerator of a script, its memory, and random numbers that depend on their keys alone."""

import hashlib
import os
import resource
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from common.cli import UserError, refusing
from common.records import blaming, keep_apart, read_json, write_json

MEETING, PATIENCE = timedelta(minutes=2), timedelta(days=30)  # until all processes are there; until the last is done


def start(args):
    """The Accelerator of a script, with its trackers started; the output folder has to be apart from the inputs.

    Without a GPU, Accelerate must be told to use the CPU, or several processes would each do all the work. Where
    nobody has set OMP_NUM_THREADS, `accelerate launch` makes it 1: the cores are shared out among processes instead.
    """
    keep_apart(args)
    absent = f"Not all processes were there within {MEETING} ({{error}}): start them again."
    wrong = "--mixed_precision or --report_to cannot be had here ({error})."
    with refusing(absent, torch.distributed.DistError), refusing(wrong, ValueError):
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision, log_with=args.report_to,
            project_dir=Path(args.output_dir, ".trackers"), kwargs_handlers=[InitProcessGroupKwargs(timeout=MEETING)],
        )  # fmt: skip
    if torch.distributed.is_initialized():
        newer = getattr(torch.distributed, "set_timeout", None)  # since torch 2.14
        (newer or torch.distributed.distributed_c10d._set_pg_timeout)(PATIENCE)
    if args.report_to and not accelerator.log_with:
        raise UserError(f"--report_to {args.report_to}: that tracker is not installed (pip install {args.report_to}).")
    launched_with_default = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and launched_with_default:
        torch.set_num_threads(cores_of_a_process())
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS has none
        torch.use_deterministic_algorithms(True)
    if args.report_to:
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers("tint", config=plain)
    return accelerator


def best_device():
    """The GPU, if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def cores_of_a_process():
    """The cores of this machine, shared out among its processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def as_main_sees(read, accelerator):
    """What `read()` gives or raises, a UserError, in the main process, for all: files may change between two looks."""
    found = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = read()
        except UserError as error:
            found[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[1]:
        raise found[1]
    return found[0]


def share_out(work, accelerator):
    """This process's share of a list of work."""
    return as_main_sees(lambda: list(work), accelerator)[accelerator.process_index :: accelerator.num_processes]


def peak_memory(device):
    """The most memory, in bytes, that this process has held: on the accelerator, or of the machine's on the CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def generator(*keys):
    """A CPU random generator that depends on nothing but its keys, as (seed, class name, image index): the same numbers
    whatever the device, the batch size and the number of processes."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode(errors="surrogateescape")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def seeded(rng):
    """Inside, the global generator, from which torchvision's transforms draw, starts in the state of `rng`."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(rng.get_state())
        yield


@contextmanager
def stopwatch(path):
    """Adds the seconds spent inside to those that `path` holds; every second anew, so that a killed run's count too."""
    with blaming(path):
        before = float(read_json(path)) if Path(path).is_file() else 0.0
    start, ended = time.perf_counter(), threading.Event()

    def keep():
        while not ended.wait(1):
            with suppress(OSError):  # a full disk is the work's own affair
                write_json(path, before + time.perf_counter() - start)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write_json(path, before + time.perf_counter() - start)

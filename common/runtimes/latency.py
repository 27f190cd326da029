"""How long models take, side by side in one run."""

import time
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from common.cli import note


def benchmark(functions, min_calls=200, min_seconds=2.0):
    """The time that each call takes, of functions that take turns, so that whatever else the machine does meets them
    alike: a turn is a tenth of a second, and its first calls are not counted, for the caches and the waiting threads of
    the runtime before are not the function's own.

    Args:
        functions: {name: function without arguments}.
    Returns:
        {name: seconds of each counted call}, at least `min_calls` or `min_seconds` of each
    """
    seconds = {name: [] for name in functions}
    with tqdm(desc="timing", unit="call") as bar:
        while any(len(times) < min_calls and sum(times) < min_seconds for times in seconds.values()):
            for name, function in functions.items():
                before, calls = time.perf_counter(), 0
                while not calls or (calls < 5 and time.perf_counter() - before < 0.1):
                    function()
                    calls += 1
                end = time.perf_counter() + 0.1
                while (before := time.perf_counter()) < end:
                    function()
                    seconds[name].append(time.perf_counter() - before)
                bar.update(sum(map(len, seconds.values())) - bar.n)
    return seconds


def latency(found, batch_sizes, shape, num_threads):
    """Rows of {model, runtime, precision, device, threads, batch_size, calls, median_ms, p90_ms, p99_ms,
    images_per_second} on the same random images, copied to the device and back; a runtime of one batch size at that.

    Args:
        found: {(model, runtime, precision, device): a `Runtime`}. shape: of an image, (3, H, W).
    """
    rows, keys = [], ("model", "runtime", "precision", "device")
    for batch_size in batch_sizes:
        images = torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(0))
        able = {key: r for key, r in found.items() if not r.fixed or r.max_batch_size == batch_size}
        for _, runtime, precision, _ in found.keys() - able.keys():
            note(f"{runtime} {precision} takes one batch size only, and is not timed at {batch_size}")
        times = benchmark({key: partial(runtime.run, runtime.prepare(images)) for key, runtime in able.items()})
        for key, seconds in times.items():
            median, p90, p99 = np.percentile(seconds, [50, 90, 99])
            row = dict(zip(keys, key)) | {"threads": num_threads, "batch_size": batch_size, "calls": len(seconds)}
            row |= {"median_ms": 1e3 * median, "p90_ms": 1e3 * p90, "p99_ms": 1e3 * p99}
            rows.append(row | {"images_per_second": batch_size / median})
    return rows

"""What memory a computation takes: counted on a little of it, and said before the work starts."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.cli import note


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come into being inside and are still referred to: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before, after = (
            {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}
            for tree in ((args, kwargs), result)
        )
        for storage in (after[address] for address in after.keys() - before.keys()):
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


def peak_bytes(function, *args):
    """The most bytes of new tensors at a time while `function` is at work. Scratch memory of libraries is not seen."""
    with LiveBytes() as live:
        function(*args)
    return live.peak


def batch_bytes(function, count):
    """`peak_bytes` of a function of a batch's size, for `count`: in a line from those of one or two, and twice that."""
    few = min(2, count)
    less, more = (peak_bytes(function, size) for size in (few, 2 * few))
    return less + (count - few) * (more - less) / few


def bytes_of(*modules):
    """The bytes of modules' parameters and buffers."""
    return sum(x.nbytes for module in modules for x in [*module.parameters(), *module.buffers()])


def announce(modules, parts, device):
    """Says how much memory work needs, {what is done: bytes at its peak} beside modules, and whether it is there."""
    what, most = max(parts.items(), key=lambda part: part[1])
    needed = bytes_of(*modules) + most
    text = f"memory: about {needed / 2**30:.2f} GiB, {most / 2**30:.2f} of them for {what}"
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        text += f", of {there / 2**30:.1f}" + (": give smaller batches" if needed > 0.9 * there - 2**30 else "")
    note(text)

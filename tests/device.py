"""A device for machines that have none: its tensors say that they lie on `meta`, and keep their numbers on the CPU. As
a GPU does, it refuses to compute with tensors of both kinds; and it counts what a program would wait for."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")
ASK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}

REFUSED = {  # on a GPU, where torch.use_deterministic_algorithms is on: see its documentation
    aten.median.dim, aten.nanmedian.dim, aten.kthvalue.default, aten.histc.default, aten.bincount.default,
    aten.put_.default, aten._adaptive_avg_pool2d_backward.default, aten.adaptive_max_pool2d_backward.default,
    aten.upsample_bilinear2d_backward.default, aten.upsample_bicubic2d_backward.default,
    aten._upsample_bilinear2d_aa_backward.default, aten._upsample_bicubic2d_aa_backward.default,
    aten.reflection_pad2d_backward.default, aten.grid_sampler_2d_backward.default, aten.nll_loss2d_forward.default,
}  # fmt: skip


class Remote(torch.Tensor):
    """A tensor on the device, whose numbers are those of `near`."""

    @staticmethod
    def __new__(cls, near, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, near, requires_grad=False):
        self.near = near

    data = property(lambda self: Remote(self.near), lambda self, other: setattr(self, "near", other.near))

    def tolist(self):
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with Traffic():  # outside of one nothing is counted
            return function(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Inside, tensors can be made on the device, and `counts` are kept of copies to it, of copies to the host, and of
    questions to which a program on the host waits for the answer."""

    def __init__(self):
        super().__init__()
        self.counts = Counter(to_device=0, to_host=0, asked=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        remote = [x for x in tensors if isinstance(x, Remote)]
        local = [x for x in tensors if not isinstance(x, Remote)]
        assert all(x.device != DEVICE for x in local), f"{function}: a tensor was made of Python's numbers"
        target = kwargs.get("device")
        there = bool(remote) if target is None else torch.device(target) == DEVICE
        if function is aten.copy_.default:
            there = isinstance(args[0], Remote)
            self.counts["to_device"] += there and isinstance(args[1], torch.Tensor) and not isinstance(args[1], Remote)
            self.counts["to_host"] += not there and isinstance(args[1], Remote)
        elif function is aten._to_copy.default:
            self.counts["to_device"] += there and not remote
            self.counts["to_host"] += not there and bool(remote)
        elif remote:
            assert not any(x.dim() for x in local), f"{function}: tensors of both kinds"
            assert function not in REFUSED, f"{function} has no deterministic algorithm on a GPU"
            by_mask = function is aten.index.Tensor and any(x.dtype == torch.bool for x in remote[1:])
            self.counts["asked"] += function in ASK or by_mask
        wrappers = {id(x.near): x for x in remote}
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        near = tree_map(lambda x: x.near if isinstance(x, Remote) else x, (args, kwargs))
        result = function(*near[0], **near[1])
        if not there:
            return result
        return tree_map(lambda x: wrappers.get(id(x), Remote(x)) if isinstance(x, torch.Tensor) else x, result)


def move(value):
    """A tensor on the device; or a module, in place, with all that it holds."""
    if isinstance(value, torch.Tensor):
        return Remote(value.detach(), value.requires_grad)
    for module in value.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(move(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)
    return value

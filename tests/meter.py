"""A meter of memory that is the same on every machine: bytes in tensors, not in the process."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in tensors that an operation made and that are alive, `known` ones apart."""

    def __init__(self, known):
        super().__init__()
        self.storages = [t.untyped_storage() for t in known]
        self.sizes = {s._cdata: 0 for s in self.storages}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.free, key)
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)

"""An accelerator that isn't one: `python tests/pretend.py train_hapax.py --preset smoke --device pretend`.

Its tensors lie in CPU memory, but say that they are on the device "pretend", and whatever mixes them with tensors of
the CPU is an error, as on a GPU. So a script that runs here puts each tensor where it belongs; generators, kernels,
bf16, torch.compile and speed are not tested.
"""

import runpy
import sys

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

aten, CPU = torch.ops.aten, torch.device("cpu")
ACROSS = {
    aten.copy_.default,
    aten._copy_from.default,
    aten._to_copy.default,
}  # what moves data between devices
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Pretend(torch.Tensor):
    """A tensor `x` in disguise."""

    @staticmethod
    def __new__(cls, x):
        like = dict(strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, x.size(), **like, device="pretend:0")

    def __init__(self, x):
        self.x = x

    def __reduce_ex__(self, protocol):  # a checkpoint holds plain tensors
        return self.x.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"Pretend({self.x})"

    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        if f is torch.Tensor.tolist:
            return args[0].detach().cpu().tolist()
        if f is torch.Tensor.numpy:
            raise TypeError("a tensor on the device has no numpy(), needed: .cpu() first")
        if f in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (
                args[0],
                tuple(torch.tensor(i) if isinstance(i, list) else i for i in where),
                *args[2:],
            )
        with torch._C.DisableTorchFunctionSubclass():
            return f(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        return run(f, *args, **(kwargs or {}))


def run(f, *args, **kwargs):
    """An operation of ATen on the tensors underneath; RuntimeError if devices are mixed."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    same = (
        [t for t in tree_leaves((args[:1], args[2:])) if isinstance(t, torch.Tensor)]
        if f in INDEXING
        else tensors
    )
    here = lambda t: isinstance(t, Pretend)
    if (
        f not in ACROSS and any(map(here, tensors)) and any(t.dim() and not here(t) for t in same)
    ):  # a scalar may mix
        raise RuntimeError(
            f"{f}: tensors on {', '.join(f'{t.device} {tuple(t.shape)}' for t in tensors)}"
        )
    if "device" in kwargs and kwargs["device"] is not None:
        there, kwargs["device"] = torch.device(kwargs["device"]).type == "pretend", CPU
    else:
        there = here(tensors[0]) if f is aten.copy_.default else any(map(here, tensors))
    kwargs.pop("pin_memory", None)
    known = {
        id(t.x): t for t in tensors if here(t)
    }  # an operation in place returns what it was given
    args, kwargs = tree_map_only(Pretend, lambda t: t.x, (args, kwargs))
    out = f(*args, **kwargs)
    return (
        tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else Pretend(t), out)
        if there
        else out
    )


class Generator(torch.Generator):
    """One of the CPU, wherever it is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Backend(backend_registration._DummyBackendModule):
    """What `torch.pretend` is."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def manual_seed(self, seed):
        pass


def install():
    """Makes the device known; once in a process, for good."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", Backend())
    install.library = torch.library.Library("_", "IMPL")
    install.library.fallback(run, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    plain, torch.Generator, torch.inference_mode = (
        (torch.tensor, torch.as_tensor),
        Generator,
        torch.no_grad,
    )
    torch.tensor = lambda x, *, device=None, **k: plain[0](x, **k).to(device or CPU)
    arange = torch.arange  # resizes its result, which a wrapper does not follow
    torch.arange = lambda *ends, device=None, **k: arange(*ends, **k).to(device or CPU)
    torch.as_tensor = lambda x, *, device=None, **k: plain[1](x, **k).to(
        device or getattr(x, "device", CPU)
    )


if __name__ == "__main__":
    sys.argv, sys.path[0] = sys.argv[1:], "."
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")

"""A writer of EDM2's release format: pickles under the names of such files, with code that the reader must not run."""

import pickle
import sys
import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn

CODE = "open(__import__('os').environ['CANARY'], 'w').close()"


def reconstruct(meta):
    """Runs what is in the file, as the official code does."""
    exec(meta["module_src"])


class EasyDict(dict):
    pass


@contextmanager
def writing():
    """The modules by whose names these files call their objects; the reader must do without."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    modules = {name: types.ModuleType(name) for name in names}
    for thing, module, name in (
        (reconstruct, "torch_utils.persistence", "_reconstruct_persistent_obj"),
        (EasyDict, "dnnlib.util", "EasyDict"),
    ):
        thing.__module__, thing.__name__, thing.__qualname__ = module, name, name
        setattr(modules[module], name, thing)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


class Call:
    """Is pickled as a call of the function, whose result is given a state where there is one."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state)

    def __reduce__(self):
        return self.call


def persistent(class_name="Layer", version=6, **state):
    meta = {"type": "class", "version": version, "module_src": CODE, "class_name": class_name, "state": state}
    return Call(reconstruct, meta)


class Layer(nn.Module):
    def __init__(self, **members):
        super().__init__()
        self._init_args, self._init_kwargs = (), {}
        for name, member in members.items():
            if type(member) is torch.Tensor:
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def __reduce__(self):
        return persistent(type(self).__name__, **vars(self)).__reduce__()


class Precond(Layer):
    pass


def released(network, dtype=torch.float16):
    """The bytes of a file of one of this library's EDM2 networks."""

    def layer(module, kind=Layer):
        children = {name: layer(child) for name, child in module.named_children()}
        if isinstance(module, nn.ModuleDict):
            return nn.ModuleDict(children)
        parameters = {name: nn.Parameter(v.detach().clone()) for name, v in module.named_parameters(recurse=False)}
        return kind(**children, **parameters, **dict(module.named_buffers(recurse=False)))

    top = layer(network, Precond)
    own = ("data_scale", "noise_levels")  # which the authors' network does not have
    top._init_kwargs = {name: value for name, value in network.arguments.items() if name not in own}
    with writing():
        return pickle.dumps(EasyDict(ema=top.to(dtype).eval().requires_grad_(False)), 4)

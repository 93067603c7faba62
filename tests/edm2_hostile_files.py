"""Files in EDM2's released format, right and hostile, and the instructions of pickles that they are made of."""

import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import torch
from edm2_files import CODE, Call, EasyDict, Layer, Precond, persistent, reconstruct, writing
from torch import nn

ARGUMENTS = {"model_channels": 4, "dropout": 0.1, "use_fp16": True, "label_dim": 0, "mult": [1, 2], "name": None}


HOLE = "something else goes here"


COMMAND = 'touch "$CANARY"'


def network(width):
    """Some of EDM2's layers, under their names."""
    g = torch.Generator().manual_seed(0)

    def weight(*shape):
        return Layer(weight=nn.Parameter(torch.randn(*shape, generator=g)))

    def fourier(n):
        return Layer(freqs=torch.randn(n, generator=g), phases=torch.rand(n, generator=g))

    def gain(value):
        return nn.Parameter(torch.tensor(value))

    def block(value):
        return Layer(emb_gain=gain(value), conv_res0=weight(width, width, 3, 3), emb_linear=weight(width, 3))

    unet = Layer(out_gain=gain(0.7), emb_fourier=fourier(width), out_conv=weight(4, width, 3, 3))
    unet.enc = nn.ModuleDict({"8x8_conv": weight(width, 5, 3, 3), "8x8_block0": block(0.3)})
    unet.dec = nn.ModuleDict({"8x8_in0": block(1.1)})
    net = Precond(unet=unet, logvar_fourier=fourier(8), logvar_linear=weight(1, 8))
    net._init_kwargs = dict(ARGUMENTS)
    return net


def write(change=lambda net: None, release=lambda parts: parts, dtype=torch.float16, width=4, protocol=4):
    """The bytes of a file, with the network changed in place and the parts of the file put through ``release``."""
    net = network(width).to(dtype).eval().requires_grad_(False)
    change(net)
    scale = np.arange(4, dtype=np.float32)
    parts = EasyDict(
        encoder=persistent("StabilityVAEEncoder", scale=scale, bias=scale.astype(np.float64), _vae=None),
        dataset_kwargs=EasyDict(path="imagenet.zip", use_labels=True, resolution=512),
        loss_fn=persistent("EDM2Loss", P_mean=-0.4, note=HOLE),
        ema=net,
    )
    with writing():
        return pickle.dumps(release(parts), protocol)


# Instructions of pickles, by hand.


def text(string):
    data = string.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def text_short(string):
    return b"\x8c" + bytes([len(string)]) + string.encode()


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def call(module, attribute, *arguments):
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def plain(value):
    """The instructions that leave the value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def framed(data):
    """The bytes with the length of their only frame set right."""
    assert data[2:3] == b"\x95"
    return data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]


def splice(*instructions):
    """A file with the instructions in place of a string in the loss, which no reader needs."""
    data = write()
    assert data.count(text_short(HOLE)) == 1
    return framed(data.replace(text_short(HOLE), b"".join(instructions)))


FOUR = np.array([1, 2, 3, 4], "<f2").tobytes()


def storage(
    kind="torch\nHalfStorage",
    numel=4,
    count=4,
    data=FOUR,
    magic=torch.serialization.MAGIC_NUMBER,
    protocol=1001,
    machine=None,
    reference=None,
    keys=("0",),
):
    """A storage in PyTorch's old format."""
    machine = machine or {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}
    if reference is None:
        kind = b"c" + kind.encode() + b"\n"
        reference = b"(" + text("storage") + kind + text("0") + text("cpu") + plain(numel) + b"NtQ"
    pickles = [plain(magic), plain(protocol), plain(machine), reference, plain(list(keys))]
    return b"".join(b"\x80\x02" + p + b"." for p in pickles) + count.to_bytes(8, "little") + data


def tensor(blob, offset=0, size=(2, 2), stride=(2, 1), state=None):
    load = Call(torch.storage._load_from_bytes, blob)
    return Call(torch._utils._rebuild_tensor_v2, load, offset, size, stride, False, OrderedDict(), state=state)


def with_tensor(blob=None, **options):
    """A file with another tensor."""
    return with_entry("_buffers", "extra", tensor(storage() if blob is None else blob, **options))


def with_entry(group, key, value):
    return write(lambda net: vars(net.unet)[group].update({key: value}))


def with_attribute(name, value):
    return write(lambda net: vars(net).update({name: value}))


def module(**modules):
    return persistent(_parameters={}, _buffers={}, _modules=modules)


def deep(levels):
    inner = module()
    for _ in range(levels):
        inner = module(a=inner)
    return inner


def laughs():
    """16^6 modules in 6."""
    inner = module()
    for _ in range(6):
        inner = module(**{f"m{i}": inner for i in range(16)})
    return inner


def cycle():
    modules = {}
    modules["again"] = persistent(_parameters={}, _buffers={}, _modules=modules)
    return persistent(_parameters={}, _buffers={}, _modules=modules)


def shared_parameter(net):
    net.logvar_linear.weight = net.unet.out_conv.weight


def shared_storage(net):
    blob = Call(torch.storage._load_from_bytes, storage())
    for key in ("a", "b"):
        net.unet._buffers[key] = Call(torch._utils._rebuild_tensor_v2, blob, 0, (2, 2), (2, 1), False, OrderedDict())


def zip_file():
    file = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, file)
    return file.getvalue()


def objects():
    """An array of objects, each pickled on its own."""
    return write(release=lambda parts: parts | {"loss_fn": np.array([Call(os.system, COMMAND)], dtype=object)})


SYSTEM = os.system.__module__.encode()


HUGE = (2**32 - 1).to_bytes(4, "little")


NONE_DICT = b"}" + text("__class__") + b"Ns"


SLOTS = (None, {"__class__": None, "__setstate__": None})


IMPORTS = {
    "os.system": (SYSTEM.decode(), "system", text(COMMAND)),
    "nt.system": ("nt", "system", text(COMMAND)),
    "os by its name": ("os", "system", text(COMMAND)),
    "subprocess.Popen": ("subprocess", "Popen", plain(["sh", "-c", COMMAND])),
    "eval": ("builtins", "eval", text(CODE)),
    "exec": ("builtins", "exec", text(CODE)),
    "compile": ("builtins", "compile", text(CODE), text("x"), text("exec")),
    "getattr": ("builtins", "getattr", plain({}), text("__class__")),
    "__import__": ("builtins", "__import__", text("this")),
    "importlib": ("importlib", "import_module", text("this")),
    "runpy": ("runpy", "run_path", text("x.py")),
    "pickle.loads": ("pickle", "loads", name("builtins", "bytes")),
    "torch.load": ("torch", "load", text("x.pt")),
    "torch.hub": ("torch.hub", "load", text("x/y"), text("z")),
    "a chain of attributes": ("torch.serialization", "os.system", text(COMMAND)),
    "a chain from torch._utils": ("torch._utils", "torch.serialization.os.system", text(COMMAND)),
    "a longer name": ("torch.storage", "_load_from_bytes.__globals__.__getitem__", text("io")),
    "another container": ("torch.nn.modules.container", "Sequential"),
    "numpy.core.multiarray.scalar": ("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f4"))),
    "numpy.load": ("numpy", "load", text("x.npy")),
    "FunctionType": ("types", "FunctionType"),
    "an empty name": ("", "", b""),
    "a name of surrogates": ("\udc80", "\n\x1b[31m", b""),
}


INSTRUCTIONS = {
    "GLOBAL": b"c" + SYSTEM + b"\nsystem\n" + text(COMMAND) + b"\x85R",
    "INST": b"(" + text(COMMAND) + b"i" + SYSTEM + b"\nsystem\n",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x01",
    "EXT4": b"\x84\x01\x01\x01\x01",
    "PERSID": b"Pos.system\n",
    "BINPERSID": text("os.system") + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "BYTEARRAY8": b"\x96" + (4).to_bytes(8, "little") + b"abcd",
    "NEWOBJ_EX": name("collections", "OrderedDict") + b")}\x92",
    "LONG_BINPUT": b"Nr" + HUGE,
    "BINPUT": b"Nq\x01",
    "PUT": b"Np4294967295\n",
    "LONG1": b"\x8a\x01\x05",
    "LONG4": b"\x8b\x01\x00\x00\x00\x05",
    "DUP": b"N2",
    "POP": b"NN0",
    "FROZENSET": b"(N\x91",
    "STRING": b"S'a'\n",
    "INT": b"I5\n",
}


DAMAGED = "reading it ended in"


# Why each hostile file is refused, and what makes it.
HOSTILE = {
    **{f"imports {key}": ("wants to import", lambda v=v: splice(call(*v))) for key, v in IMPORTS.items()},
    **{f"uses {key}": (f"instruction {key},", lambda v=v: splice(v)) for key, v in INSTRUCTIONS.items()},
    "uses OBJ": ("wants to import", lambda: splice(b"(", name(SYSTEM.decode(), "system"), text(COMMAND), b"o")),
    "uses OBJ on a name that is allowed": ("OBJ", lambda: splice(b"(", name("dnnlib.util", "EasyDict"), b"o")),
    "NEWOBJ of a process": ("wants to import", lambda: splice(name("subprocess", "Popen"), text("x"), b"\x85\x81")),
    "reduces by os.system": ("wants to import", lambda: with_attribute("x", Call(os.system, COMMAND))),
    "a parameter by os.system": ("wants to import", lambda: with_entry("_parameters", "x", Call(os.system, COMMAND))),
    "calls a string": ("of type str ", lambda: splice(text("os.system"), b")R")),
    "calls what a call returns": ("of type object ", lambda: splice(call("numpy", "ndarray"), b")R")),
    "calls without a tuple": ("of type str ", lambda: splice(name("numpy", "ndarray"), text("x"), b"R")),
    "imports a number": (DAMAGED, lambda: splice(b"K\x01", text("system"), b"\x93")),
    # attributes
    "__setstate__ of a dictionary": (
        "of type dict ",
        lambda: splice(call("collections", "OrderedDict"), b"}", text("__setstate__"), b"N", b"s", b"b"),
    ),
    "attributes of a class": ("of type function ", lambda: splice(name("numpy", "ndarray"), NONE_DICT, b"b")),
    "slots of a class": ("of type function ", lambda: splice(name("numpy", "ndarray"), b"N", NONE_DICT, b"\x86b")),
    "attributes of a string": ("of type str ", lambda: splice(text("x"), NONE_DICT, b"b")),
    "slots of a container": ("something else", lambda: with_entry("_modules", "x", Call(nn.ModuleDict, state=SLOTS))),
    "slots of a module": (
        "something else",
        lambda: with_entry("_modules", "x", Call(*module().call[:1], *module().call[1], state=SLOTS)),
    ),
    "attributes of a tensor": ("is not a tensor", lambda: with_tensor(state={"__class__": None})),
    "slots of a tensor": ("is not a tensor", lambda: with_tensor(state=SLOTS)),
    "an array of objects": ("not of floats", objects),
    "an array of a structure": ("not of floats", lambda: splice(call("numpy", "dtype", text("V8"), b"\x89\x88"))),
    # sizes that lie, nesting, numbers of instructions
    "BINBYTES of 4 GiB": ("expected 4294967295 bytes", lambda: splice(b"B", HUGE)),
    "BINBYTES8 of 4 GiB": ("", lambda: splice(b"\x8e", (2**32).to_bytes(8, "little"))),
    "BINBYTES8 of 2^62": ("", lambda: splice(b"\x8e", (2**62).to_bytes(8, "little"))),
    "BINUNICODE of 4 GiB": ("expected 4294967295 bytes", lambda: splice(b"X", HUGE)),
    "BINUNICODE8 of 4 GiB": ("", lambda: splice(b"\x8d", (2**32).to_bytes(8, "little"))),
    "BYTEARRAY8 of 4 GiB": ("", lambda: splice(b"\x96", (2**32).to_bytes(8, "little"))),
    "LONG4 of 2 GiB": ("", lambda: splice(b"\x8b\xff\xff\xff\x7f")),
    "LONG4 of negative length": ("", lambda: splice(b"\x8b\xff\xff\xff\xff")),
    "a frame of 2^62": ("truncated", lambda: splice(b"\x95", (2**62).to_bytes(8, "little"), b"N")),
    "a frame of 4 GiB": ("truncated", lambda: write()[:3] + (2**32).to_bytes(8, "little") + write()[11:]),
    "text that is no UTF-8": ("codec", lambda: splice(b"X\x02\x00\x00\x00\xc3\x28")),
    "100 000 nested lists as a key": ("of type list ", lambda: splice(b"}", b"]" * 100_000, b"a" * 99_999, b"Ns")),
    "100 000 marks": ("nests them too deeply", lambda: splice(b"(" * 100_000, b"t" * 100_000)),
    "400 000 nested tuples as a key": ("of type tuple ", lambda: splice(b"})", b"\x85" * 400_000, b"Ns")),
    "600 000 dictionaries": ("too many instructions", lambda: splice(b"(", b"}" * 600_000, b"t")),
    "an unset place of the memo": (DAMAGED, lambda: splice(b"j", HUGE)),
    "nothing on the stack": ("lacks its arguments", lambda: b"\x80\x04R."),
    "nothing since the mark": ("lacks its arguments", lambda: splice(b"N(\x85t")),
    "no mark": (DAMAGED, lambda: b"\x80\x04t."),
    "an open mark": ("add up", lambda: b"\x80\x04(}."),
    "no value": ("add up", lambda: b"\x80\x04."),
    "two values": ("add up", lambda: b"\x80\x04}}."),
    "appends to a tuple": ("of type tuple ", lambda: splice(b")Na")),
    "sets items of a list": ("of type list ", lambda: splice(b"]", text("a"), b"Ns")),
    "a key without a value": ("zip", lambda: splice(b"}(", text("a"), b"u")),
    "a list as a key": ("of type list ", lambda: splice(b"}]Ns")),
    "bytes behind the end": ("7 bytes follow", lambda: write() + b"\x80\x04K\x01.os"),
    # networks
    "another class": ("is a Layer, not a Precond", lambda: write(release=lambda p: p | {"ema": module()})),
    "another version": ("version", lambda: write(release=lambda p: p | {"ema": persistent("Precond", 5)})),
    "a version of text": ("version", lambda: write(release=lambda p: p | {"ema": persistent("Precond", "6")})),
    "a layer of another version": ("version", lambda: with_entry("_modules", "x", persistent("Layer", 7))),
    "no network": ("the key 'ema'", lambda: write(release=lambda p: EasyDict(encoder=p["encoder"]))),
    "a list": ("the key 'ema'", lambda: write(release=lambda p: [p["ema"]])),
    "a network alone": ("the key 'ema'", lambda: write(release=lambda p: p["ema"])),
    "a text as network": ("something else", lambda: write(release=lambda p: p | {"ema": "Precond"})),
    "a container as network": ("something else", lambda: write(release=lambda p: p | {"ema": nn.ModuleDict()})),
    "a network without facts": ("something else", lambda: write(release=lambda p: p | {"ema": Call(reconstruct, {})})),
    "a network without arguments": ("of type nonetype ", lambda: write(lambda net: vars(net).pop("_init_kwargs"))),
    "an argument that is a tensor": ("argument x", lambda: with_attribute("_init_kwargs", {"x": torch.ones(2)})),
    "an argument that is a dictionary": ("argument x", lambda: with_attribute("_init_kwargs", {"x": {"y": 1}})),
    "an argument of nested lists": ("argument x", lambda: with_attribute("_init_kwargs", {"x": [[1]]})),
    "a number as argument's name": ("of type int ", lambda: with_attribute("_init_kwargs", {1: 2})),
    "parameters that are a list": ("of type list ", lambda: with_attribute("_parameters", [])),
    "a network without parameters": ("of type nonetype ", lambda: write(lambda net: vars(net).pop("_parameters"))),
    "modules in a cycle": ("occurs twice", lambda: with_entry("_modules", "x", cycle())),
    "exponentially many modules": ("occurs twice", lambda: with_entry("_modules", "x", laughs())),
    "a module in a module 20 times": ("too deep", lambda: with_entry("_modules", "x", deep(20))),
    "a parameter in two modules": ("together with another", lambda: write(shared_parameter)),
    "tensors that share a storage": ("together with another", lambda: write(shared_storage)),
    "a parameter and a buffer of one name": ("occurs twice", lambda: with_entry("_buffers", "out_gain", torch.ones(1))),
    "a parameter and a module of one name": ("occurs twice", lambda: with_entry("_modules", "out_gain", module())),
    "a number as name": ("of type int ", lambda: with_entry("_parameters", 1, torch.ones(2))),
    "a dotted name": ("or is none", lambda: with_entry("_parameters", "a.b", torch.ones(2))),
    "an empty name": ("or is none", lambda: with_entry("_parameters", "", torch.ones(2))),
    "a name of 100 000 letters": ("or is none", lambda: with_entry("_parameters", "x" * 100_000, torch.ones(2))),
    "a name that colours a terminal": ("or is none", lambda: with_entry("_parameters", "x\x1b[31m", torch.ones(2))),
    "a text as parameter": ("is not a tensor", lambda: with_entry("_parameters", "x", "text")),
    "a list as parameter": ("is not a tensor", lambda: with_entry("_parameters", "x", [1.0])),
    "an array as parameter": ("is not a tensor", lambda: with_entry("_parameters", "x", np.ones(3))),
    "a module as parameter": ("is not a tensor", lambda: with_entry("_parameters", "x", module())),
    "a tensor as module": ("something else", lambda: with_entry("_modules", "x", torch.ones(2))),
    "a gain without a weight": ("no unet.out_conv", lambda: write(lambda net: net.unet._modules.pop("out_conv"))),
    # tensors
    "4 GiB in a file of 1 kB": ("more elements", lambda: with_tensor(size=(2**31 - 1,), stride=(1,))),
    "4 GiB by a stride of 0": ("not contiguous", lambda: with_tensor(size=(2**31 - 1,), stride=(0,))),
    "2^60 elements": ("more elements", lambda: with_tensor(size=(2**30, 2**30), stride=(2**30, 1))),
    "a tensor of 100 dimensions": ("shape", lambda: with_tensor(size=(1,) * 100, stride=(1,) * 100)),
    "a transposed tensor": ("not contiguous", lambda: with_tensor(stride=(1, 2))),
    "a negative stride": ("not contiguous", lambda: with_tensor(stride=(-2, -1))),
    "a stride too few": ("shape", lambda: with_tensor(stride=(1,))),
    "a negative offset": ("shape", lambda: with_tensor(offset=-1)),
    "an offset too far": ("more elements", lambda: with_tensor(offset=1)),
    "an offset that is no number": ("is not a tensor", lambda: with_tensor(offset="0")),
    "a negative size": ("shape", lambda: with_tensor(size=(-2, -2))),
    "a size of 0": ("shape", lambda: with_tensor(size=(2, 0))),
    "a size that is a fraction": ("shape", lambda: with_tensor(size=(2.0, 2))),
    "a size that is a list": ("is not a tensor", lambda: with_tensor(size=[2, 2])),
    "a tensor without a storage": ("is not a tensor", lambda: with_tensor("0000")),
    "a tensor that points into text": ("is not a tensor", lambda: with_tensor(None, offset=None)),
    # storages
    **{
        f"a storage of {kind}": ("wants to import torch." + kind, lambda k=kind: with_tensor(storage(f"torch\n{k}")))
        for kind in ("ComplexFloatStorage", "QInt8Storage", "LongStorage", "BoolStorage", "BFloat16Storage", "load")
    },
    "a storage that imports os.system": (
        f"wants to import {SYSTEM.decode()}.system",
        lambda: with_tensor(storage(reference=b"c" + SYSTEM + b"\nsystem\n")),
    ),
    "a storage that imports a dotted name": (
        "wants to import torch.serialization.os.system",
        lambda: with_tensor(storage("torch.serialization\nos.system")),
    ),
    "a storage that calls os.system": (
        "wants to import",
        lambda: with_tensor(storage(reference=b"c" + SYSTEM + b"\nsystem\n" + text(COMMAND) + b"\x85R")),
    ),
    "a storage that calls": ("instruction REDUCE", lambda: with_tensor(storage(reference=b"NNR"))),
    "a storage that builds": ("instruction BUILD", lambda: with_tensor(storage(reference=b"NNb"))),
    "a storage with a huge memo": ("instruction LONG_BINPUT", lambda: with_tensor(storage(reference=b"Nr" + HUGE))),
    "a storage with an inner storage": (
        "instruction STACK_GLOBAL",
        lambda: with_tensor(storage(reference=call("torch.storage", "_load_from_bytes", b"C\x00"))),
    ),
    "a storage with a huge LONG4": ("", lambda: with_tensor(storage(reference=b"\x8b\xff\xff\xff\x7f"))),
    "a reference that is a number": ("not stored as", lambda: with_tensor(storage(reference=b"K\x01Q"))),
    "a reference that is None": ("not stored as", lambda: with_tensor(storage(reference=b"NQ"))),
    "a reference to a module": (
        "not stored as",
        lambda: with_tensor(storage(reference=plain(("module", "a", "b", "c")) + b"Q")),
    ),
    "a reference with text for the type": (
        "not stored as",
        lambda: with_tensor(storage(reference=plain(("storage", "HalfStorage", "0", "cpu", 4, None)) + b"Q")),
    ),
    "a reference to a view": (
        "not stored as",
        lambda: with_tensor(storage().replace(b"NtQ", plain(("1", 0, 4)) + b"tQ")),
    ),
    "2^40 elements announced": ("not stored as", lambda: with_tensor(storage(numel=2**40))),
    "2^40 elements announced twice": ("not stored as", lambda: with_tensor(storage(numel=2**40, count=2**40))),
    "a number of elements below 0": ("not stored as", lambda: with_tensor(storage(numel=-4, count=2**64 - 4))),
    "a number of elements that is a fraction": ("not stored as", lambda: with_tensor(storage(numel=4.0))),
    "fewer elements than announced": ("not stored as", lambda: with_tensor(storage(data=b"12345"))),
    "more elements than announced": ("not stored as", lambda: with_tensor(storage(data=b"1234567890"))),
    "another key": ("not stored as", lambda: with_tensor(storage(keys=("1",)))),
    "two keys": ("not stored as", lambda: with_tensor(storage(keys=("0", "1")))),
    "another magic number": ("not stored as", lambda: with_tensor(storage(magic=12345))),
    "another version of the storage": ("not stored as", lambda: with_tensor(storage(protocol=1000))),
    "a big-endian storage": ("not stored as", lambda: with_tensor(storage(machine={"little_endian": False}))),
    "an empty storage": ("", lambda: with_tensor(b"")),
    "half a storage": ("", lambda: with_tensor(storage()[:60])),
    "a storage that goes on behind its end": ("not stored as", lambda: with_tensor(storage(data=b""))),
    "a zip file as storage": ("", lambda: with_tensor(zip_file())),
    # other files
    "empty": ("empty", lambda: b""),
    "text": ("", lambda: b"<html><body>404 Not Found</body></html>\n"),
    "zeros": ("", lambda: bytes(1000)),
    "a pickle of protocol 0": ("instruction", lambda: write(protocol=0)),
    "a pickle of protocol 2": ("instruction GLOBAL", lambda: write(protocol=2)),
    "a number in digits": ("", lambda: b"I" + b"9" * 100_000 + b"\n."),
    "a file of torch.save": ("", zip_file),
    "a file of torch.save before 1.6": ("instruction", storage),
    "a pickle of something else": ("the key 'ema'", lambda: pickle.dumps({"weight": [1.0, 2.0]}, 4)),
    "half a file": ("", lambda: write()[: len(write()) // 2]),
    **{f"random bytes {i}": ("", lambda i=i: np.random.default_rng(i).bytes(1000)) for i in range(5)},
}

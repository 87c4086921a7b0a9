"""Crafted and randomly altered checkpoint files, and a process with little memory that reads them.

Run as a program, `python hostile.py KIND SEED COUNT FOLDER`, it reads the files of a kind and prints how they ended, as JSON. A
crash, a hang, an error that is not a `CheckpointError` with the name of the file, or too much memory ends it with another code.
"""

import collections
import io
import itertools
import json
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

EXTRA_MEMORY = 600 * 2**20
"""Bytes of address space that the process may take for reading, besides what it has after its imports."""
SECONDS_PER_FILE = 20
"""Of processor time."""
FOUR = np.arange(4, dtype=np.float32).tobytes()


def checkpoint():
    """A state dict among other objects, as training scripts save it."""
    generator = torch.Generator().manual_seed(0)
    state = collections.OrderedDict((f"layer{i}.weight", torch.randn(3, i + 1, generator=generator)) for i in range(6))
    state |= {"half": torch.ones(5, dtype=torch.float16), "count": torch.tensor(7), "part": torch.arange(20.0)[4:10:2]}
    state["parameter"] = torch.nn.Parameter(torch.ones(2, 2))
    meta = {"epoch": 3, "lr": np.float64(0.1), "history": np.ones(4), "names": ["a", "b"], "set": {1, 2}}
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1}]}}


def torch_file(obj, zipped=True, **kwargs):
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=zipped, **kwargs)
    return buffer.getvalue()


def zip_of(pickled, records=None, compression=zipfile.ZIP_STORED):
    """A zip file as torch.save writes it, with this pickle and these records of storages, by key."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", b"little")
        for key, content in (records or {"0": FOUR}).items():
            archive.writestr(f"a/data/{key}", content)
    return buffer.getvalue()


def parts_of(file):
    """The pickle and the storages of a zip file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        records = {name[5:]: archive.read(full) for name, full in names.items() if name.startswith("data/")}
        return archive.read(names["data.pkl"]), records


def legacy(*pickles, tail=b""):
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return head + b"".join(pickles) + tail


def safetensors_file(header, content=b"abcd"):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content


# Pickles, instruction by instruction


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def named(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def tensor(key="0", offset=0, size=(2,), stride=(1,), sized=None, view=b""):
    """The instructions that push a tensor. `sized` pushes its size instead of `size`, `view` a part of its storage."""
    storage = b"(" + text("storage") + named("torch FloatStorage") + text(key) + text("cpu") + number(2) + view + b"tQ"
    shape = (sized or number(size)) + number(stride)
    return named("torch._utils _rebuild_tensor_v2") + b"(" + storage + number(offset) + shape + b"\x89}tR"


def program(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


def entries(**tensors):
    """The program that builds a dictionary of tensors."""
    return program(b"}", *(text(name) + instructions + b"s" for name, instructions in tensors.items()))


def pointer(module):
    """dtype("O8") with its list flag cleared: numpy's scalar() then takes eight bytes of the file for a pointer to an object."""
    dtype = named("numpy dtype") + b"(" + text("O8") + b"\x89\x88tR"
    state = b"(" + number(3) + text("|") + b"NNN" + number(8) + number(8) + number(0) + b"tb"
    return zip_of(program(b"}", text("meta"), named(f"{module} scalar"), b"(", dtype, state, b"U\x08" + b"A" * 8 + b"tRs"))


def overlapping_records():
    """Two hundred records that are all the same bytes of the file: a megabyte becomes 200."""
    content = bytes(2**20)
    records = {str(i): content if i == 0 else b"" for i in range(200)}
    file = bytearray(zip_of(entries(**{f"t{i}": tensor(str(i), 0, (2**18,)) for i in range(200)}), records))
    with zipfile.ZipFile(io.BytesIO(bytes(file))) as archive:
        first = archive.getinfo("a/data/0")
    at = bytes(file).index(b"PK\x01\x02")
    while file[at : at + 4] == b"PK\x01\x02":
        length, extra, comment = struct.unpack_from("<HHH", file, at + 28)
        if file[at + 46 : at + 46 + length].startswith(b"a/data/"):
            struct.pack_into("<III", file, at + 16, first.CRC, first.file_size, first.file_size)
            struct.pack_into("<I", file, at + 42, first.header_offset)
        at += 46 + length + extra + comment
    return bytes(file)


def claiming(size):
    """A file with a record that is larger than the file, as its directory says."""
    file = bytearray(zip_of(entries(w=tensor())))
    at = file.rindex(b"a/data/0") - 46
    struct.pack_into("<II", file, at + 20, size, size)
    return bytes(file)


LAUGHS = b")" + b"2\x86" * 200
"""Pushes a tuple of the same tuple twice, 200 times: 2**200 leaves."""
ONE_ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

CRAFTED = {
    "a pointer in numpy's scalar": lambda: pointer("numpy.core.multiarray"),
    "the same, with the names of numpy 2": lambda: pointer("numpy._core.multiarray"),
    "an array of objects": lambda: torch_file({"w": np.array([object])}),
    "a call": lambda: zip_of(
        program(b"}", text("meta"), named("os system") + b"(" + text("true") + b"tRs", text("w"), tensor(), b"s")
    ),
    "an unknown memo index": lambda: zip_of(program(b"j\xff\xff\xff\xff")),
    "a huge string": lambda: zip_of(program(b"\x8d" + struct.pack("<Q", 2**40))),
    "a huge string, legacy": lambda: legacy(program(b"\x8d" + struct.pack("<Q", 2**40))),
    "a huge bytearray": lambda: zip_of(program(b"\x96" + struct.pack("<Q", 2**40))),
    "a huge integer": lambda: zip_of(program(b"\x8b" + struct.pack("<i", 2**31 - 1))),
    "deep tuples": lambda: zip_of(program(b")" + b"\x85" * 300_000)),
    "deep lists": lambda: zip_of(program(b"]" * 300_000 + b"a" * 299_999)),
    "deep state dicts": lambda: zip_of(program(b"}" + (text("model") + b"}") * 100_000 + b"s" * 100_000)),
    "2**200 leaves as a key": lambda: zip_of(program(b"}" + LAUGHS + b"Ns")),
    "2**200 leaves as a size": lambda: zip_of(entries(w=tensor(sized=LAUGHS))),
    "2**200 leaves as a key, legacy": lambda: legacy(entries(w=tensor()), program(b"]" + LAUGHS + b"a")),
    "a dictionary as a size": lambda: zip_of(entries(w=tensor(sized=b"}"))),
    "100,000 keys with equal hashes": lambda: zip_of(
        program(b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(100_000)) + b"u")
    ),
    "many instructions": lambda: zip_of(program(b"}" * 2_100_000)),
    "a list that contains itself": lambda: zip_of(program(b"]q\x00h\x00a")),
    "instructions of protocol 0": lambda: zip_of(b"(dp0\nS'w'\np1\nI1\ns."),
    "extension codes": lambda: zip_of(program(b"\x82\x01")),
    "out-of-band buffers": lambda: zip_of(program(b"\x97\x98")),
    "nothing on the stack": lambda: zip_of(b"."),
    "a compressed record": lambda: zip_of(entries(w=tensor(size=(2**26,))), {"0": bytes(5 * 2**26)}, zipfile.ZIP_DEFLATED),
    "overlapping records": overlapping_records,
    "a record larger than the file": lambda: claiming(2**31),
    "two pickles": lambda: zip_of(entries(w=tensor()), {"0": FOUR, "data.pkl": b"."}),
    "a view of a storage": lambda: zip_of(entries(w=tensor(view=text("1") + number(1) + number(1) + b"\x87"))),
    "no record": lambda: zip_of(entries(w=tensor("7"))),
    "half a number": lambda: zip_of(entries(w=tensor()), {"0": FOUR[:-1]}),
    "larger than its storage": lambda: zip_of(entries(w=tensor(size=(5,)))),
    "beyond its storage": lambda: zip_of(entries(w=tensor(offset=3))),
    "a negative offset": lambda: zip_of(entries(w=tensor(offset=-1))),
    "a negative stride": lambda: zip_of(entries(w=tensor(offset=3, stride=(-1,)))),
    "a huge empty tensor": lambda: zip_of(entries(w=tensor(size=(0, 2**61, 2**61), stride=(1, 1, 1)))),
    "more values than integers": lambda: zip_of(entries(w=tensor(size=(2**61, 2**61), stride=(0, 0)))),
    "a thousand dimensions": lambda: zip_of(entries(w=tensor(size=(1,) * 1000, stride=(0,) * 1000))),
    "size without stride": lambda: zip_of(entries(w=tensor(size=(2, 2)))),
    "a huge count, legacy": lambda: legacy(
        entries(w=tensor()), program(b"]" + text("0") + b"a"), tail=struct.pack("<q", 2**60) + FOUR
    ),
    "a negative count, legacy": lambda: legacy(
        entries(w=tensor()), program(b"]" + text("0") + b"a"), tail=struct.pack("<q", -1) + FOUR
    ),
    "a huge header": lambda: struct.pack("<Q", 2**40) + b"{}",
    "a deep header": lambda: struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
    "a huge shape": lambda: safetensors_file({"a": ONE_ENTRY | {"shape": [2**40, 2**40]}}),
    "overlapping tensors": lambda: safetensors_file({"a": ONE_ENTRY, "b": ONE_ENTRY}),
    "an unknown type": lambda: safetensors_file({"a": ONE_ENTRY | {"dtype": "F7"}}),
}
"""Functions that return files which must be refused."""


# Random alterations


def flipped(data, rng):
    """Some bytes changed, removed, inserted, or copied from elsewhere."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, start = rng.randrange(len(data)), rng.randrange(len(data))
        data[at : at + rng.randint(0, 4)] = rng.choice(
            [
                bytes([data[at] ^ 1 << rng.randrange(8)]),
                b"",
                rng.randbytes(rng.randint(1, 8)),
                data[start : start + rng.randint(1, 40)],
            ]
        )
    return bytes(data)


def one_bit_flipped(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


NAMES = [
    *("torch._utils _rebuild_parameter", "torch LongStorage", "torch._utils _rebuild_sparse_tensor", "torch Tensor"),
    *("numpy dtype", "numpy.core.multiarray scalar", "numpy._core.multiarray _reconstruct", "collections OrderedDict"),
    *("_codecs encode", "builtins eval", "torch.storage _load_from_bytes", "collections defaultdict"),
]
POOL = [
    *(code.code.encode("latin-1") for code in pickletools.opcodes if code.arg is None and code.name != "STOP"),
    *(
        code.code.encode("latin-1") + bytes([n] * 8)
        for code in pickletools.opcodes
        if code.arg is not None
        for n in (0, 1, 127, 255)
    ),
    *map(named, NAMES),
    *(tensor(), text("state_dict"), text("w") + tensor() + b"s", b")R", number(2**70)),
]
"""Instructions, most of them out of place."""


def spliced(pickled, rng):
    """A pickle with instructions removed, repeated, exchanged, or inserted; or a program of random instructions."""
    if rng.random() < 0.2:
        return program(b"}", *rng.choices(POOL, k=rng.randint(1, 30)))
    parts = [pickled[a:b] for a, b in itertools.pairwise(position for _, _, position in pickletools.genops(pickled))]
    for _ in range(rng.randint(1, 3)):
        at, start = rng.randrange(len(parts)), rng.randrange(len(parts))
        some = rng.choice([[], parts[start : start + rng.randint(1, 10)], rng.choices(POOL, k=rng.randint(1, 3))])
        parts[at : at + rng.randint(0, 3)] = some
    return b"".join(parts) + b"."


def altered_pickles(rng, count):
    """Files whose pickles are altered, whole in all else."""
    originals = [parts_of(torch_file(checkpoint(), pickle_protocol=protocol)) for protocol in (2, 4)]
    old = torch_file(checkpoint(), zipped=False)
    file, ends = io.BytesIO(old), []
    for _ in range(5):  # about the file and its system, the object, and the keys of its storages
        ends.append([*pickletools.genops(file)][-1][2] + 1)
    for _ in range(count):
        alter, (pickled, records) = rng.choice([flipped, spliced]), rng.choice(originals)
        if rng.random() < 0.6:
            yield zip_of(alter(pickled, rng), records)
        else:
            start, end = rng.choice([*itertools.pairwise(ends[2:])])
            yield old[:start] + alter(old[start:end], rng) + old[end:]


def altered_files(file, rng, count):
    """Copies of a file whose bytes are altered anywhere."""
    for _ in range(count):
        yield rng.choice([one_bit_flipped, flipped])(file, rng)


def altered_headers(file, rng, count):
    """Copies of a safetensors file with one value of the header changed, and the lengths right."""
    (length,) = struct.unpack("<Q", file[:8])
    values = [None, "x", "F16", "F8_E5M2", "C64", [], [0], [-1], [1.5], [2**62, 4], [0, 2**62], {"model": "{" * 10**5}, {"a": 1}]
    for _ in range(count):
        header = json.loads(file[8 : 8 + length])
        entry = header[rng.choice(list(header))]
        target = rng.choice([header, entry])
        target[rng.choice([*target, "", "a" * 5000])] = rng.choice([*values, dict(entry)])
        yield safetensors_file(header, file[8 + length :])


def huge_sizes(folder):
    """Altered copies of both files of a saved model: sizes of the configuration, which the metadata of the weights confirms."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"], config["model"]["labels"]
    file = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    places = [("backbone", "args", "base_channels"), ("head", "num_classes"), ("aux_head", "num_classes")]
    places += [("neck", "args", name) for name in ("out_channels", "mid_channels", "groups")]
    places += [("input_spec", name) for name in ("num_frames", "short_side", "num_clips")]
    for (*place, name), value in itertools.product(places, (2048, 10**5, 10**9, 2**62)):
        model = json.loads(json.dumps(config["model"]))
        inside = model
        for key in place:
            inside = inside[key]
        inside[name] = value
        header["__metadata__"] = {"model": json.dumps({"model": model})}
        yield json.dumps({**config, "model": model}), safetensors_file(header, file[8 + length :])


# The process that reads them


def limit_memory():
    size = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + EXTRA_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def outcome(read, path):
    """Read a file; return "refused" or "read". Any other end is an error of this process, which a hang kills."""
    from tpn import CheckpointError

    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_FILE)
    try:
        read(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return "read"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if str(path.parent) not in message or "memory" in message.lower() or len(message) > 2000:
        raise ValueError(message)
    return "refused"


def read_tensors(path):
    """Read a file, and use every value that its tensors refer to."""
    from tpn.zoo.reader import read_checkpoint

    tensors, metadata = read_checkpoint(path)
    assert all(type(name) is str for name in (*tensors, *metadata))
    for value in tensors.values():
        assert type(value) is torch.Tensor
        assert value.numel() > 10**6 or value.float().sum().isfinite() is not None
    return tensors


def read_unchanged(path):
    """Read a file, whose tensors must be those of the checkpoint: checksums find every change."""
    expected = checkpoint()["state_dict"]
    tensors = read_tensors(path)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def load(path):
    import tpn

    tpn.create_model(path.parent)


def main(kind, seed, count, folder):
    rng, count, folder = random.Random(int(seed)), int(count), Path(folder)
    torch.set_num_threads(1)
    path = folder / "model.safetensors"
    saved = path.read_bytes() if path.exists() else b""
    kinds = {
        "crafted": (read_tensors, lambda: (make() for make in CRAFTED.values())),
        "pickles": (read_tensors, lambda: altered_pickles(rng, count)),
        "files": (read_unchanged, lambda: altered_files(torch_file(checkpoint()), rng, count)),
        "safetensors": (
            read_tensors,
            lambda: itertools.chain(altered_headers(saved, rng, count), altered_files(saved, rng, count)),
        ),
        "sizes": (load, lambda: huge_sizes(folder)),
    }
    read, make = kinds[kind]
    files, ends = list(make()), []
    limit_memory()
    for number, file in enumerate(files):
        if kind == "sizes":
            config, file = file
            (folder / "config.json").write_text(config)
        path.write_bytes(file)
        try:
            ends.append(outcome(read, path))
        except BaseException:
            print(f"file {number} of kind {kind}, seed {seed}: {path}", file=sys.stderr)
            raise
    print(json.dumps(dict(zip(CRAFTED, ends, strict=True)) if kind == "crafted" else collections.Counter(ends)))


if __name__ == "__main__":
    main(*sys.argv[1:])

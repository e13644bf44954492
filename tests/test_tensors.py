"""A user's keys and values: both kinds of file, every layout, nothing read that is not looked at, and damaged files."""

import io
import json
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from kvsim.errors import UserError
from kvsim.tensors import check_layout, load_tensors

SIZES = {"b": 2, "h": 3, "t": 5, "d": 4}
TYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}


def arrays(layout="htd", dtype=np.float32, **sizes):
    """K, V and Q whose numbers say where they are; V has a dim of its own, Q twice the heads and two tokens."""
    sizes = SIZES | sizes
    out = {}
    for side, other in (("k", {}), ("v", {"d": sizes["d"] + 1}), ("q", {"h": 2 * sizes["h"], "t": 2})):
        shape = [(sizes | other)[axis] for axis in layout]
        out[side] = (np.arange(np.prod(shape)).reshape(shape) + 10 * ord(side)).astype(dtype)
    return out


def safetensors_bytes(tensors, types=None, **changes):
    """The format: length of the header, header, data in its order."""
    types = types or {}
    header, data = {"__metadata__": {"format": "np"}}, b""
    for name, array in tensors.items():
        kind = types.get(name) or next(kind for kind, dtype in TYPES.items() if dtype == array.dtype)
        raw = array.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": array.shape,
            "data_offsets": (len(data), len(data) + len(raw)),
        }
        header[name] |= changes.get(name, {})
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def save(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        path.write_bytes(safetensors_bytes(tensors))
    return path


def refusal(path, layout="htd"):
    with pytest.raises(UserError) as error:
        load_tensors(path, layout)
    text = str(error.value)
    assert str(path) in text or "layout" in text
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("layout", ["thd", "htd", "bhtd", "bthd", "td", "dt", "hdt", "tdhb"])
def test_every_layout(tmp_path, suffix, layout):
    saved = arrays(layout)
    found = load_tensors(save(tmp_path / f"kv{suffix}", saved), layout)
    for side in "kvq":
        expected = np.einsum(f"{layout}->{''.join(a for a in 'bhtd' if a in layout)}", saved[side])
        for axis, letter in enumerate("bhtd"):
            expected = expected if letter in layout else np.expand_dims(expected, axis)
        got = getattr(found, side)
        assert got.dtype == saved[side].dtype and np.array_equal(got, expected)
        assert not got.flags.writeable
    assert found.dtypes == ("float32",) * 3


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types(tmp_path, suffix, dtype):
    saved = arrays(dtype=dtype)
    found = load_tensors(save(tmp_path / f"kv{suffix}", saved))
    assert found.dtypes == (np.dtype(dtype).name,) * 3
    assert all(np.array_equal(a[0], b) for a, b in zip(found[:3], saved.values(), strict=True))


def test_bfloat16_is_kept_as_bits(tmp_path):
    saved = {side: (array.view(np.uint32) >> 16).astype(np.uint16) for side, array in arrays().items()}
    saved["v"] = arrays()["v"]
    found = load_tensors(save(tmp_path / "kv.safetensors", saved))
    assert found.dtypes == ("bfloat16", "float32", "bfloat16") and np.array_equal(found.k[0], saved["k"])


def test_the_metrics_take_what_is_read(tmp_path):
    """Also where the data of a file begin at an odd byte."""
    from kvsim.kernels.quant import metrics_cpu, metrics_ref

    saved = arrays()
    raw = safetensors_bytes(saved)
    for pad in range(4):
        header = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]] + b" " * pad
        path = tmp_path / f"kv{pad}.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + len(header) - pad :])
        found = load_tensors(path)
        assert metrics_cpu.errors(found.k, found.k + 1) == metrics_ref.errors(saved["k"], saved["k"] + 1)


def test_names_and_no_queries(tmp_path):
    k, v, _ = arrays().values()
    for names in (("K", "V"), ("key", "value"), ("Key_Cache", "value_cache"), ("keys", "VALUES")):
        path = save(tmp_path / "kv.npz", dict(zip(names, (k, v), strict=True)) | {"other": np.arange(3)})
        found = load_tensors(path)
        assert found.q is None and found.dtypes == ("float32",) * 2 and np.array_equal(found.v[0], v)


def test_order_of_fortran_and_of_bytes(tmp_path):
    k, v, q = arrays().values()
    path = save(tmp_path / "kv.npz", {"k": np.asfortranarray(k), "v": v.astype(">f4"), "q": q})
    found = load_tensors(path)
    assert np.array_equal(found.k[0], k) and np.array_equal(found.v[0], v)


def test_a_compressed_file_is_unpacked(tmp_path, monkeypatch):
    saved = arrays()
    np.savez_compressed(tmp_path / "kv.npz", **saved)
    found = load_tensors(tmp_path / "kv.npz")
    assert all(np.array_equal(a[0], b) for a, b in zip(found[:3], saved.values(), strict=True))
    monkeypatch.setattr("kvsim.tensors.MAX_UNPACKED_BYTES", 100)
    assert "is compressed" in refusal(tmp_path / "kv.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_not_looked_at_takes_no_memory(tmp_path, suffix):
    """Of safetensors 2 GB, which are a hole on the disk."""
    path, shape = tmp_path / f"kv{suffix}", (8, 250_000, 128)
    num_bytes = 4 * 8 * 250_000 * 128
    if suffix == ".npz":
        save(path, {"v": np.zeros((8, 250_000, 1), np.float32), "k": np.zeros((8, 250_000, 1), np.float32)})
    else:
        header = {
            side: {"dtype": "F32", "shape": shape, "data_offsets": (i * num_bytes, (i + 1) * num_bytes)}
            for i, side in enumerate("kv")
        }
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 2 * num_bytes)
    tracemalloc.start()
    try:
        found = load_tensors(path)
        assert float(found.k[0, 7, 249_999, 0]) == 0 and found.k.shape[:3] == (1, 8, 250_000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------ refusals


def test_layouts_that_are_none():
    assert check_layout("bthd") == "bthd"
    for wrong in ("", "t", "hd", "htdx", "thdd", "HTD", "h t d"):
        with pytest.raises(UserError, match="such as thd or bhtd"):
            check_layout(wrong)


def test_files_that_are_none(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.npz")
    assert "No such file" in refusal(tmp_path / "absent.safetensors")
    (tmp_path / "kv.pt").write_bytes(b"PK")
    assert "no .npz or .safetensors" in refusal(tmp_path / "kv.pt")
    (tmp_path / "folder.npz").mkdir()
    assert "directory" in refusal(tmp_path / "folder.npz")
    for name in ("empty.npz", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"")
        refusal(tmp_path / name)
    (tmp_path / "text.npz").write_text("k,v\n1,2\n")
    assert "numpy.savez" in refusal(tmp_path / "text.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_that_do_not_fit(tmp_path, suffix):
    path = tmp_path / f"kv{suffix}"
    k, v, q = arrays().values()
    for saved, reason in (
        ({"k": k}, "has no V, only 'k'; name it v or value"),
        ({"v": v, "x": k}, "has no K, only"),
        ({"k": k, "key": k, "v": v}, "'k' and 'key' could both be K"),
        ({"k": k[0], "v": v}, r"array 'k' has the shape (5, 4), which is no htd"),
        ({"k": k[None], "v": v}, "such as bhtd"),
        (
            {"k": k[:, :3], "v": v},
            "K is 1 batch, 3 heads, 3 tokens, 4 dim and V 1 batch, 3 heads, 5 tokens, 5 dim",
        ),
        ({"k": k[:, :0], "v": v[:, :0]}, "no numbers"),
        ({"k": k, "v": v, "q": q[:4]}, "the heads of Q a multiple"),
        ({"k": k, "v": v, "q": q[..., :2]}, "batch and dim must be equal"),
    ):
        assert reason in refusal(save(path, saved))


def test_types_that_are_no_floats(tmp_path):
    k, v, _ = arrays().values()
    for wrong in (
        k.astype(np.int32),
        k.astype(complex),
        k.view("V4"),
        k.astype(str),
        k.astype(np.longdouble),
    ):
        assert "save float16, float32 or float64" in refusal(save(tmp_path / "kv.npz", {"k": wrong, "v": v}))
    np.savez(tmp_path / "kv.npz", k=np.array([{"a": 1}], object), v=v)
    assert "of type object" in refusal(tmp_path / "kv.npz")
    path = tmp_path / "kv.safetensors"
    path.write_bytes(safetensors_bytes({"k": k, "v": v}, {"k": "I32"}))
    assert "has I32 numbers; save F16, BF16, F32, F64" in refusal(path)


def test_sizes_that_a_file_only_claims(tmp_path):
    k, v, _ = arrays().values()
    path = tmp_path / "kv.safetensors"
    path.write_bytes(safetensors_bytes({"k": k, "v": v}, k={"shape": (3, 5, 4_000_000)}))
    assert "cannot have 240 bytes" in refusal(path)
    path.write_bytes(safetensors_bytes({"k": k, "v": v})[:-1])
    assert "its header describes" in refusal(path)
    path = tmp_path / "kv.npz"
    for shape in ((3, 5, 4_000_000), (3, 5, 3), (-3, 5, -4), (2**40, 2**40, 2**40)):
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("k.npy", member.getvalue() + k.tobytes())
            archive.writestr("v.npy", member.getvalue() + k.tobytes())
        refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("k.npy", b"\x93NUMPY\x01\x00" + b"x" * 40)
        archive.writestr("v.npy", b"")
    assert "is no NumPy array" in refusal(path)


@pytest.mark.parametrize("suffix", [".npz", ".compressed.npz", ".safetensors"])
@pytest.mark.parametrize("rounds", [1000, pytest.param(50_000, marks=pytest.mark.heavy)])
def test_damaged_files_are_told_in_a_sentence(tmp_path, suffix, rounds):
    """Bytes changed, cut and doubled: the same shapes, or one sentence; never another exception."""
    path, draw = tmp_path / f"kv{suffix}", random.Random(1)
    if "compressed" in suffix:
        np.savez_compressed(path, **arrays())
    else:
        save(path, arrays())
    whole = path.read_bytes()
    for _ in range(rounds):
        raw = bytearray(whole)
        kind = draw.randrange(3)
        at = draw.randrange(len(raw))
        if kind == 0:
            for _ in range(draw.randrange(1, 5)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
        elif kind == 1:
            del raw[at : at + draw.randrange(1, 300)]
        else:
            raw[at:at] = raw[draw.randrange(len(raw)) :][: draw.randrange(1, 50)]
        path.write_bytes(raw)
        try:
            found = load_tensors(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert found.k.ndim == 4 and np.asarray(found.k).size == found.k.size
        path.unlink()

"""What `kvsim quant` measures, beside the definitions on whole arrays."""

import struct
from pathlib import Path

import numpy as np
import pytest

from kvsim import quality
from kvsim.errors import UserError
from kvsim.formats import kv_format
from kvsim.kernels.quant import kivi_split, metrics_ref, of_format
from kvsim.kernels.quant.synthetic import kv_heads
from kvsim.tensors import load_tensors

NAMES = ("fp8", "int4-channel-g32/int4-token-g32", "kivi-2", "turboquant_4bit_nc")
FORMATS = [kv_format(name, None) for name in NAMES]


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(quality, "WINDOW", 128)


def save(path, **arrays):
    np.savez(path, **arrays)
    return load_tensors(path, "bhtd" if arrays["k"].ndim == 4 else "htd")


def after_all(kv, k, v):
    """Of whole sequences at once: what waits stays as it is."""
    tokens, done = k.shape[1], k.shape[1] // 32 * 32
    coded = kivi_split(tokens) if kv.name == "kivi-2" else (done if "channel" in kv.name else tokens, tokens)
    k_after, v_after = k.copy(), v.copy()
    k_after[:, : coded[0]] = of_format.fake_quantize_side(kv, "k", k[:, : coded[0]])
    v_after[:, : coded[1]] = of_format.fake_quantize_side(kv, "v", v[:, : coded[1]])
    return k_after, v_after


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_file_by_windows_is_the_whole(tmp_path, short_windows, is_causal):
    """Four query heads share two KV heads, 300 tokens are no whole number of windows, groups or residual tokens."""
    h = kv_heads(2, num_tokens=300, seed=1)
    q = np.random.default_rng(0).standard_normal((4, 40, 128)).astype(np.float16)
    k, v = h.k.astype(np.float16), h.v.astype(np.float16)
    heads = quality.of_file("f", save(tmp_path / "f.npz", k=k, v=v, q=q), 16, seed=3, is_causal=is_causal)
    assert (heads.num_heads, heads.query_heads, heads.num_queries) == (2, 4, 16)
    k, v = k.astype(np.float32), v.astype(np.float32)
    for kv, found in zip(FORMATS, quality.measure(heads, FORMATS), strict=True):
        k_after, v_after = after_all(kv, k, v)
        assert_equal(found.k, metrics_ref.errors(k, k_after))
        assert_equal(found.v, metrics_ref.errors(v, v_after))
        visible = None if is_causal else 300
        options = {"visible": visible, "num_queries": 16, "seed": 3}
        assert_equal(found.attention, metrics_ref.attention_errors(q, k, v, k_after, v_after, **options))


def test_no_bit_depends_on_threads_or_windows_of_a_format(short_windows):
    heads = quality.generated(300, 1, 64, "qwen", [0, 1], num_queries=8)
    once, again = (quality.measure(heads, FORMATS, threads=threads) for threads in (1, 3))
    for a, b in zip(once, again, strict=True):
        assert a.k == b.k and a.v == b.v
        np.testing.assert_array_equal(a.attention, b.attention)
    assert heads.num_heads == 2 and len(once[0].attention.kl) == 2


def test_skipped_layers_are_left_alone(tmp_path):
    h = kv_heads(2, num_tokens=64, head_dim=32)
    k = np.stack([h.k, h.v, h.k])
    np.savez(tmp_path / "f.npz", k=k, v=k, q=k)
    heads = quality.of_file("f", load_tensors(tmp_path / "f.npz", "layers,heads,tokens,dim"))
    assert list(heads.layer_of) == [0, 0, 1, 1, 2, 2]
    kv = [kv_format("q4_0", None)] * 2
    all_coded, skipped = quality.measure(heads, kv, skipped_layers=[set(), {0, 2}])
    np.testing.assert_allclose(skipped.attention.kl[[0, 1, 4, 5]], 0, atol=1e-15)
    np.testing.assert_array_equal(skipped.attention.kl[2:4], all_coded.attention.kl[2:4])
    assert 0 < skipped.k.mse < all_coded.k.mse


def test_without_queries_there_is_no_attention(tmp_path):
    h = kv_heads(1, num_tokens=64, head_dim=32)
    heads = quality.of_file("f", save(tmp_path / "f.npz", k=h.k, v=h.v))
    (found,) = quality.measure(heads, FORMATS[:1])
    assert found.attention is None and found.k.mse > 0 and heads.query_heads == 0


def test_bfloat16_is_read_by_its_bits(tmp_path):
    h = kv_heads(1, num_tokens=64, head_dim=32)
    bits = [(x.view(np.uint32) >> 16).astype("<u2") for x in (h.k, h.v)]
    header = b'{"k":{"dtype":"BF16","shape":[1,64,32],"data_offsets":[0,4096]},"v":{"dtype":"BF16","shape":[1,64,32],"data_offsets":[4096,8192]}}'  # fmt: skip  # noqa: E501
    path = tmp_path / "f.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits[0].tobytes() + bits[1].tobytes())
    (found,) = quality.measure(quality.of_file("f", load_tensors(path)), [kv_format("bfloat16")])
    assert found.k.mse == found.v.mse == 0 and found.k.sqnr_db == np.inf


def test_numbers_that_are_none_are_counted(tmp_path, short_windows):
    k = np.ones((2, 200, 32), np.float32)
    k[0, 150, :3] = np.nan
    v = np.ones((2, 200, 32), np.float32)
    v[1, 0, 0] = -np.inf
    heads = quality.of_file("f.npz", save(tmp_path / "f.npz", k=k, v=v))
    with pytest.raises(UserError, match=r"f.npz: of 12,800 numbers 3 of K and 1 of V are NaN or infinite"):
        quality.measure(heads, FORMATS[:1])


def test_queries_that_are_no_numbers_are_counted(tmp_path):
    q = np.ones((1, 9, 32), np.float32)
    q[0, 4, :2] = np.nan
    heads = quality.of_file("f.npz", save(tmp_path / "f.npz", k=np.ones_like(q), v=np.ones_like(q), q=q))
    with pytest.raises(UserError, match=r"f.npz: of 288 sampled numbers 2 of Q are NaN or infinite"):
        quality.measure(heads, FORMATS[:1])


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"k": (1, 9, 32), "v": (1, 9, 64)}, "K has heads of 32 numbers and V of 64"),
        ({"k": (1, 9, 32), "v": (1, 9, 32), "q": (1, 10, 32)}, "Q has 10 tokens and K 9"),
    ],
)
def test_what_does_not_belong_together_is_told(tmp_path, shapes, told):
    tensors = save(tmp_path / "f.npz", **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=told):
        quality.of_file("f.npz", tensors)


def test_pages_of_a_file_leave_memory_again(tmp_path):
    tensors = save(
        tmp_path / "f.npz", k=np.ones((1, 4096, 128), np.float32), v=np.ones((1, 4096, 128), np.float32)
    )
    assert tensors.k.sum() == 4096 * 128
    mapped = f"{tmp_path}/f.npz"
    assert resident_kib(mapped) > 1000
    tensors.forget()
    assert resident_kib(mapped) < 100
    assert tensors.k.sum() == 4096 * 128


def resident_kib(path):
    """Pages of a file in this process's memory."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        pytest.skip("needs /proc")
    size, is_ours = 0, False
    for line in lines:
        if "-" in line.split(" ")[0]:
            is_ours = line.endswith(path)
        elif is_ours and line.startswith("Rss:"):
            size += int(line.split()[1])
    return size

"""quant.cu compiled for devices that are not here: machine code for three generations, and what its PTX has to show.

`pip install -e '.[nvrtc]'` gets the compiler, which needs no driver."""

import re

import pytest

from kvsim.kernels.quant import cuda
from tests.kernels.cuda_host import all_kernels

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install -e '.[nvrtc]'")
pytestmark = pytest.mark.heavy

GENERATIONS = ("80", "90", "100")  # A100, H100 and H200, B200


class Built:
    """PTX, machine code and the compiler's words of some kernels."""

    def __init__(self, names, generation):
        program = checked(nvrtc.nvrtcCreateProgram(cuda.source().encode(), b"quant.cu", 0, [], []))
        for name in names:
            checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
        options = [f"--gpu-architecture=sm_{generation}", *cuda.COMPILE, "--ptxas-options=-v"]
        result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        self.generation = generation
        self.log = text_of(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        assert result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, self.log
        self.ptx = text_of(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        self.num_bytes = checked(nvrtc.nvrtcGetCUBINSize(program))
        self.symbols = {
            name: checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode() for name in names
        }

    def body(self, name):
        """The PTX of one kernel."""
        start = re.search(rf"\.entry {re.escape(self.symbols[name])}\(", self.ptx).start()
        end = self.ptx.find(".entry ", start + 10)
        return self.ptx[start : end if end > 0 else None]

    def resources(self, name):
        """(registers, bytes of registers that were spilled) of one kernel."""
        said = self.log[self.log.index(f"'{self.symbols[name]}'") :]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        return int(re.search(r"Used (\d+) registers", said)[1]), int(spills[1]) + int(spills[2])


def checked(result):
    assert result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, result
    return result[1] if len(result) > 1 else None


def text_of(program, size_of, read):
    room = b" " * checked(size_of(program))
    checked(read(program, room))
    return room.decode().rstrip("\0")


@pytest.fixture(scope="module", params=GENERATIONS)
def built(request):
    return Built(all_kernels(), int(request.param))


def test_every_kernel_becomes_machine_code(built):
    assert built.num_bytes > 100_000
    for name in all_kernels():
        assert len(built.body(name)) > 200


def test_nothing_is_fused_or_approximate(built):
    """The one fused operation is of the double logarithm in ggml's mxfp4."""
    assert "fma.rn.f32" not in built.ptx and "mad.f32" not in built.ptx
    for loose in (".approx", "div.full", ".ftz"):
        found = [line for line in built.ptx.splitlines() if loose in line and ".f64" not in line]
        assert not found, found[:3]


def test_usual_kernels_access_16_bytes(built):
    for name in all_kernels():
        work, _, arguments = name.partition("<")
        body = built.body(name)
        loads = re.findall(r"ld\.global\.(?:nc\.)?v4\.[bfu]32", body)
        stores = re.findall(r"st\.global\.v4\.[bfu]32", body)
        floats = 2 if arguments.startswith("float") else 1  # accesses for eight numbers
        if work in ("quantize_rows", "fake_rows", "quantize_columns", "fake_columns", "encode_fp8", "rotate_rows",
                    "quantize_nvfp4", "quantize_mxfp4", "quantize_ggml"):  # fmt: skip
            assert len(loads) >= floats * (
                8 if "columns" in work else 2 if work == "quantize_nvfp4" else 1
            ), name
        if work in ("dequantize_rows", "fake_rows", "dequantize_columns", "fake_columns", "decode_fp8", "rotate_rows",
                    "dequantize_fp4", "dequantize_ggml"):  # fmt: skip
            assert len(stores) >= floats * (8 if "columns" in work else 1), name


def test_fp8_is_converted_by_instructions_where_there_are_some(built):
    has_some = built.generation >= 89
    body = built.body("encode_fp8<Half, 1>") + built.body("decode_fp8<Half, 1>")
    assert ("cvt.rn.satfinite.e4m3x2.f32" in body) == has_some
    assert ("cvt.rn.f16x2.e4m3x2" in body) == has_some


def test_no_usual_kernel_spills_registers(built, capsys):
    rows = [(name, *built.resources(name)) for name in all_kernels()]
    with capsys.disabled():
        most = max(rows, key=lambda row: row[1])
        print(
            f"\n{len(rows)} kernels, {built.num_bytes} bytes of machine code, at most {most[1]} registers: {most[0]}"
        )
    assert not [row for row in rows if row[2]], rows

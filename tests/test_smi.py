"""nvidia-smi's list of GPUs instead of a GPU's name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim import catalog
from kvsim.errors import UserError
from kvsim.memory import fit
from kvsim.specs import GpuSpec, deployment, load_gpu
from kvsim.units import GIB, MIB

HEADER = "name, memory.total [MiB], memory.used [MiB]\n"
H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, {} MiB\n"


@pytest.fixture
def smi(tmp_path):
    def write(text, name="gpu.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_the_list_of_a_machine(smi):
    gpu = load_gpu(smi(HEADER + H100.format(4) * 7 + H100.format(1030)))
    assert (gpu.name, gpu.num_listed, gpu.used_bytes) == ("h100-80gb-sxm", 8, 1030 * MIB)
    assert gpu.memory_total_bytes == 81559 * MIB
    assert gpu.total_bytes == load_gpu("h100").total_bytes
    assert gpu.tflops_dense == load_gpu("h100").tflops_dense


def test_memory_is_that_of_the_file(smi):
    """ "some units report 81251-81559 MiB": an A100 with less than the catalogue's."""
    gpu = load_gpu(smi("NVIDIA A100-SXM4-80GB, 81251 MiB, 0 MiB\n"))
    assert gpu.memory_total_bytes == 81251 * MIB
    assert load_gpu("a100").total_bytes - gpu.total_bytes == (81920 - 81251) * MIB


@pytest.mark.parametrize(
    "text",
    [
        "NVIDIA L4, 23034 MiB, 12 MiB",
        "NVIDIA L4, 23034, 12\n",  # csv,noheader,nounits
        "name, memory.total [MiB], memory.used [MiB]\r\nNVIDIA L4, 23034 MiB, 12 MiB\r\n\r\n",
        "index, memory.used [MiB], name, memory.total [MiB], uuid\n0, 12 MiB, NVIDIA L4, 23034 MiB, GPU-1\n",
        "\ufeffname, memory.total [MiB], memory.used [MiB]\nNVIDIA L4, 23034 MiB, 12 MiB\n",
        ("\ufeff" + HEADER + "NVIDIA L4, 23034 MiB, 12 MiB\n").encode("utf-16-le"),  # PowerShell
    ],
)
def test_ways_to_write_it(text, smi):
    gpu = load_gpu(smi(text))
    assert (gpu.name, gpu.used_bytes, gpu.num_listed) == ("l4", 12 * MIB, 1)


def test_used_may_be_missing(smi):
    assert load_gpu(smi("name, memory.total [MiB]\nNVIDIA L4, 23034 MiB\n")).used_bytes == 0


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb-sxm"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("NVIDIA H100 PCIe", "h100-80gb-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("Tesla V100-PCIE-16GB", "v100-pcie-16gb"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
    ],
)
def test_names_that_drivers_print(printed, name, smi):
    mib = catalog.find("gpus", name)["memory_total_mib"]
    assert load_gpu(smi(f"{HEADER}{printed}, {mib} MiB, 3 MiB\n")).name == name


def test_a_deployment_on_the_file(smi):
    path = smi(HEADER + H100.format(600) * 2)
    dep = deployment("llama-3.1-8b", gpu=load_gpu(path), tensor_parallel_size=2)
    assert "h100-80gb-sxm by the nvidia-smi file: 2 of 81,559 MiB, of which 0.59 GiB were in use" in dep.notes
    by_name = deployment("llama-3.1-8b", gpu="h100", tensor_parallel_size=2)
    assert (
        fit(dep).num_gpu_blocks == fit(by_name).num_gpu_blocks
    )  # the engine divides the total, not what is free
    with pytest.raises(UserError, match="4 GPUs are asked for, but the nvidia-smi file lists 2"):
        deployment("llama-3.1-8b", gpu=str(path), tensor_parallel_size=4)


def test_memory_in_use_must_leave_what_the_engine_asks_for(smi):
    dep = deployment("llama-3.1-8b", gpu=str(smi(HEADER + H100.format(20_000))))
    with pytest.raises(
        UserError, match=r"free once CUDA has started beside 19\.53 GiB already in use; lower it to 0\.74"
    ):
        fit(dep)
    assert fit(dep.replace(gpu_memory_utilization=0.74)).failure is None
    assert fit(dep.replace(gpu_memory_utilization=0.74)).total_bytes == round(79.19 * GIB)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (HEADER + H100.format(4) + "Tesla T4, 15360 MiB, 0 MiB\n",
         r"lists NVIDIA H100 80GB HBM3 \(line 2\) and Tesla T4 \(line 3\); an engine's GPUs must be of one kind"),
        (HEADER + "NVIDIA H100 80GB HBM3 MIG 1g.10gb, 9856 MiB, 0 MiB\n", "a slice of a GPU"),
        (HEADER + "NVIDIA H100 80GB HBM3, [N/A], [N/A]\n", r"line 2: memory\.total is '\[N/A\]'"),
        (HEADER + "NVIDIA L4, 23034 MiB, lots\n", r"line 2: memory\.used is 'lots'"),
        (HEADER + "NVIDIA L4, 23034 MiB, 99999 MiB\n", "more than memory.total"),
        (HEADER + "NVIDIA L4, 0 MiB, 0 MiB\n", "too little for a GPU"),
        (HEADER + "NVIDIA L4\n", "line 2: has 1 columns"),
        (HEADER + "NVIDIA Z9000, 23034 MiB, 0 MiB\n", "GPU 'z9000' is not in the catalogue"),
        (HEADER, "lists no GPU"),
        ("", "lists no GPU"),
        ("name, memory.used [MiB]\nNVIDIA L4, 1 MiB\n", "no column 'memory.total'"),
        ("memory.total [MiB], index\n23034 MiB, 0\n", "no column 'name'"),
        ("GPU 0: NVIDIA L4 (UUID: GPU-0)\n", "is no list of GPUs; make the file with nvidia-smi --query-gpu"),
        ("+-----------------------+\n| NVIDIA-SMI 580.65.06  |\n", "is no list of GPUs"),
        (b"\xff\xfe\x00", "is no text"),
        (b"\x80\x81\x82", "is no text"),
        (b"a" * 1_000_001, "is too large"),
    ],
)  # fmt: skip
def test_lists_that_are_none(text, sentence, smi):
    path = smi(text)
    with pytest.raises(UserError, match=sentence) as error:
        load_gpu(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_gpu(tmp_path / "gpu.csv")
    with pytest.raises(UserError, match="there is no such file"):
        load_gpu("gpu.csv")


@given(
    head=st.sampled_from(["", HEADER, "name\n"]),
    text=st.text(alphabet=st.sampled_from(list('NVIDIA L4,\n\r"123 MiB[].memory\0\ufeffé')), max_size=80)
    | st.text(max_size=40),
)
def test_any_text(tmp_path_factory, head, text):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes((head + text).encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_gpu(path), GpuSpec)
    except UserError as error:
        assert "\n" not in str(error)

"""`kvsim fit --worksheet`: the six steps, and every field that can be wrong."""

import math
import subprocess
import sys

import pytest

from kvsim import catalog
from kvsim.cli import main
from kvsim.errors import UserError
from kvsim.memory.worksheet import CLASS_FIELDS, FIELDS, answer, read_worksheet, sequence_bytes
from tests.cli.test_fit import facts_of, mistake

ALL_THIRTEEN = """\
model = "our 70B"
params = "70B"
weight_dtype = "fp8"
layers = 80
kv_heads = 8
head_dim = 128
kv_dtype = "fp8"
gpu = "80GB"
gpus = 2
headroom = 0.2
[[class]]
name = "chat"
context = 4096
concurrency = 10
burst = 1.25
[[class]]
name = "agent"
context = "64K"
concurrency = 1
"""
SMALL = 'model = "llama-3.1-8b"\ngpu = "l40s"\n[[class]]\ncontext = 1000\nconcurrency = 3\n'


def written(folder, text):
    path = folder / "w.toml"
    path.write_text(text)
    return path


def test_claim_C07_thirteen_inputs_six_steps(tmp_path, capsys):
    assert len((*FIELDS, *CLASS_FIELDS)) == 13
    path = written(tmp_path, ALL_THIRTEEN)
    assert all(f"{field} = " in ALL_THIRTEEN for field in (*FIELDS, *CLASS_FIELDS))
    facts = facts_of(capsys, "--worksheet", path)
    assert facts["weights_bytes"] == 70 * 10**9 and facts["shard_bytes"] == 35 * 10**9
    assert facts["reserve_bytes"] == 16 * 10**9 and facts["left_bytes"] == 29 * 10**9
    chat, agent = facts["classes"]
    per_token = 80 * 2 * 4 * 128  # four of eight heads on each of two GPUs, one byte
    assert chat["sequence_bytes"] == 4096 * per_token and agent["sequence_bytes"] == 65536 * per_token
    assert (chat["sequences"], agent["sequences"]) == (13, 1)
    assert facts["kv_bytes"] == (13 * 4096 + 65536) * per_token and facts["fits"]
    assert main(["fit", "--worksheet", str(path)]) == 0
    numbered = [line[:2] for line in capsys.readouterr().out.splitlines() if line[1:3] == ". "]
    assert numbered == ["1.", "2.", "3.", "4.", "5.", "6."]


def test_claim_C08_headroom_is_ten_to_twenty_percent_unless_told(tmp_path, capsys):
    path = written(tmp_path, SMALL)
    facts = facts_of(capsys, "--worksheet", path)
    assert 0.1 <= facts["headroom"] <= 0.2 and not facts["headroom_is_low"]
    assert facts["reserve_bytes"] == math.ceil(facts["gpu_bytes"] * 0.15)
    main(["fit", "--worksheet", str(path)])
    assert "3. Reserve of 15 % of " in capsys.readouterr().out
    low = written(tmp_path, "headroom = 0.08\n" + SMALL)
    main(["fit", "--worksheet", str(low)])
    assert "below the 10 to 20 % that planners keep" in capsys.readouterr().out


def test_a_model_brings_its_exact_weights_and_its_windows(tmp_path):
    facts = answer(read_worksheet(written(tmp_path, SMALL)))
    assert facts["weights_bytes"] == 2 * 8_030_261_248
    assert facts["classes"][0]["sequence_bytes"] == 1000 * 131_072
    text = SMALL.replace("llama-3.1-8b", "gemma-3-27b").replace("1000", "131072")
    sheet = read_worksheet(written(tmp_path, text))
    assert sequence_bytes(sheet, 131_072) == 11_173_625_856  # 10 full and 52 layers with windows of 1,024
    text = SMALL.replace("llama-3.1-8b", "deepseek-v3").replace("\n[[", "\ngpus = 8\n[[")
    assert (
        sequence_bytes(read_worksheet(written(tmp_path, text)), 131_072) == 9_210_691_584
    )  # the same on all


def test_one_format_for_what_is_nominal_and_16_bit_embeddings_for_a_model(tmp_path):
    text = 'weight_dtype = "int4"\n' + SMALL.replace("llama-3.1-8b", "llama-3-70b")
    assert answer(read_worksheet(written(tmp_path, text)))["weights_bytes"] / 1e9 == pytest.approx(
        39.77, abs=0.005
    )


@pytest.mark.parametrize(
    ("chat", "long", "separate", "shared", "split"),
    [(10, 1, False, 1, 2), (190, 9, True, 3, 3), (110, 4, False, 2, 3)],
)
def test_a_separate_pool_when_it_costs_no_more_replicas(chat, long, separate, shared, split, tmp_path):
    """A replica has room for 100 short sequences or 10 long ones: 80e9 bytes less 8 and 22, 0.5e9 a short one."""
    text = (
        'params = 11000000000\nlayers = 1\nkv_heads = 1\nhead_dim = 125000\ngpu = "80GB"\nheadroom = 0.1\n'
        f"[[class]]\ncontext = 1000\nconcurrency = {chat}\n[[class]]\ncontext = 10000\nconcurrency = {long}\n"
    )
    facts = answer(read_worksheet(written(tmp_path, text)))
    assert [row["fit_at_once"] for row in facts["classes"]] == [100, 10] and facts["left_bytes"] == 50 * 10**9
    assert facts["separate_pools"] == separate and facts["fits"] == (shared == 1)
    assert (facts["replicas_shared"], facts["replicas_split"]) == (shared, split)


def test_what_cannot_fit_says_so(tmp_path, capsys):
    path = written(tmp_path, SMALL.replace("llama-3.1-8b", "llama-3-70b"))
    assert main(["fit", "--worksheet", str(path)]) == 1
    assert "weights and reserve leave nothing for the KV cache" in capsys.readouterr().out
    path = written(tmp_path, SMALL.replace("1000", '"900K"'))
    assert main(["fit", "--worksheet", str(path)]) == 1
    out = capsys.readouterr().out
    assert (
        "not one sequence of class 1 fits" in out
        and "note: class 1: 921,600 tokens are more than the 131,072" in out
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model = ", "is no TOML"),
        (SMALL.replace("gpu =", "gpy ="), "there is no field 'gpy'; did you mean 'gpu'"),
        (SMALL.replace("context", "contxt"), "class 1: there is no field 'contxt'; did you mean 'context'"),
        (
            SMALL.replace("llama-3.1-8b", "llama-3.1-8x"),
            "the model must be known, and model 'llama-3.1-8x' is not in the catalogue",
        ),
        (SMALL.replace('"llama-3.1-8b"', "8"), "model is 8; write a name"),
        (SMALL.replace('model = "llama-3.1-8b"\n', ""), "params is missing; give it, or a model"),
        (SMALL.replace('gpu = "l40s"\n', ""), "gpu is missing"),
        (SMALL.replace("l40s", "l40z"), "gpu: GPU 'l40z' is not in the catalogue"),
        (SMALL.replace('"l40s"', "48"), "gpu is 48; write a name"),
        (SMALL.replace("l40s", "48G"), "gpu: '48G' is not an amount of memory"),
        ("layers = 3\n" + SMALL, "kv_heads is missing beside layers"),
        ("params = -7\n" + SMALL, "params is -7; write a number of parameters"),
        ('weight_dtype = "fp17"\n' + SMALL, "weight_dtype: quantization 'fp17' is not modelled"),
        ("kv_dtype = 8\n" + SMALL, "kv_dtype is 8; write a format"),
        ('kv_dtype = "fp9"\n' + SMALL, "kv_dtype: kv_cache_dtype 'fp9' is not modelled"),
        ("gpus = 3\n" + SMALL, "gpus is 3, which neither divides"),
        ("gpus = 1.5\n" + SMALL, "gpus is 1.5; write a whole number above 0"),
        ("gpus = true\n" + SMALL, "gpus is True; write a whole number above 0"),
        ("headroom = 1.0\n" + SMALL, "headroom is 1.0; write a share"),
        ("headroom = nan\n" + SMALL, "headroom is nan; write a share"),
        (SMALL.split("[[")[0], "there is no class; write [[class]]"),
        (SMALL.replace("[[class]]", "[class]"), "class is no list of tables"),
        (SMALL.replace("context = 1000\n", ""), "class 1: context is missing"),
        (SMALL.replace("concurrency = 3", "concurrency = 0"), "class 1: concurrency is 0; write a whole"),
        (SMALL + "burst = 0.5\n", "class 1: burst is 0.5; write how many times"),
        (SMALL + "burst = inf\n", "class 1: burst is inf"),
        (SMALL + "name = 5\n", "class 1: name is 5; write a text"),
        (
            SMALL + 'name = "a"\n[[class]]\nname = "a"\ncontext = 1\nconcurrency = 1\n',
            "is also another class's",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_with_file_and_field(text, told, tmp_path, capsys):
    message = mistake(capsys, "--worksheet", written(tmp_path, text))
    assert f"{tmp_path}/w.toml: " in message and told in message


def test_what_is_no_file_and_flags_beside_it(tmp_path, capsys):
    assert "there is no such file" in mistake(capsys, "--worksheet", tmp_path / "none.toml")
    assert "cannot be read (Is a directory)" in mistake(capsys, "--worksheet", tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    assert "is no TOML" in mistake(capsys, "--worksheet", tmp_path / "bytes.toml")
    path = written(tmp_path, SMALL)
    for words, flag in (
        (["--gpu", "h100"], "--gpu"),
        (["llama-3.1-8b"], "MODEL"),
        (["-tp", "2"], "--tensor-par"),
    ):
        assert f"{flag}" in mistake(capsys, "--worksheet", path, *words)


@pytest.mark.parametrize("name", catalog.ids("models"))
def test_every_model_has_a_worksheet_or_a_reason(name, tmp_path):
    try:
        facts = answer(read_worksheet(written(tmp_path, SMALL.replace("llama-3.1-8b", name))))
    except UserError as error:
        assert "the model must be known" in str(error)
    else:
        assert facts["weights_bytes"] > 0 and facts["classes"][0]["sequence_bytes"] > 0


def test_it_loads_neither_numba_nor_arrow(tmp_path):
    program = (
        f"import sys; from kvsim.cli import main; main(['fit', '--worksheet', {str(written(tmp_path, SMALL))!r}]);"
        "sys.exit(bool({'numba', 'pyarrow', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0

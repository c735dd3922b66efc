from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlm_env.profiles.step_tables import REGIMES, read_step_table
from qlm_env.spec import ConfigError

AEGAEON = """model,device,input_len,batch,prefill_s,decode_s,prefill_p10,n
llama,A10,512,4,0.4,0.04,0,12
llama,A10,512,16,0.9,0.0009,0,12
llama,A10,16,130,0.5,0.08,0,12
llama,A100,512,4,0.1,0.01,0,12
qwen,A10,512,4,0.3,0.03,0,12
"""

STEPS = """system,backend,model,tp,kind,prefill_tokens,prefix,decode_seqs,context_len,latency_ms
a100,vllm,llama,1,prefill,128,512,0,0,20
a100,vllm,llama,1,decode,0,0,8,1000,30
a100,vllm,llama,1,mixed,64,0,4,256,40
a100,vllm,llama,2,decode,0,0,8,1000,15
h100,vllm,llama,1,decode,0,0,8,1000,10
"""

ONE_SYSTEM = """kind,prefill_tokens,prefix,decode_seqs,context_len,latency_ms
prefill,128,512,0,0,20
decode,0,0,8,1000,30
mixed,64,0,4,256,40
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_aegaeon_row_is_a_prefill_step_and_a_decode_step(tmp_path: Path) -> None:
    """The row of 8,192 tokens and the batch of 130, which the engine split, are left out."""
    table = read_step_table(write(tmp_path, AEGAEON), {"model": "llama", "device": "A10"})
    assert [REGIMES[index] for index in table.regime] == ["prefill", "decode"]
    assert table.new_tokens.tolist() == [2048, 4]
    assert table.decodes.tolist() == [0, 4]
    assert table.kv_tokens.tolist() == [0, 4 * 516]
    assert table.attention_tokens2.tolist() == [4 * 512 * 256, 0]
    assert table.latency_s.tolist() == [0.4, 0.04]


def test_a_row_of_the_other_format_is_one_step(tmp_path: Path) -> None:
    table = read_step_table(write(tmp_path, STEPS), {"model": "llama", "system": "a100", "tp": 1})
    assert [REGIMES[index] for index in table.regime] == ["prefill", "decode", "mixed"]
    assert table.new_tokens.tolist() == [128, 8, 68]
    assert table.decodes.tolist() == [0, 8, 4]
    assert table.kv_tokens.tolist() == [0, 8000, 1024]
    assert table.attention_tokens2.tolist() == [128 * (512 + 64), 0, 64 * 32]
    assert table.latency_s.tolist() == pytest.approx([0.02, 0.03, 0.04])


def test_a_table_of_one_system_needs_no_selection(tmp_path: Path) -> None:
    plain = read_step_table(write(tmp_path, ONE_SYSTEM), {"model": "anything", "tp": 7})
    assert plain.latency_s.tolist() == pytest.approx([0.02, 0.03, 0.04])
    seconds = read_step_table(write(tmp_path, ONE_SYSTEM.replace("latency_ms", "latency_s")), {})
    assert seconds.latency_s.tolist() == [20, 30, 40]


def test_rows_keeps_the_chosen_steps(tmp_path: Path) -> None:
    table = read_step_table(write(tmp_path, ONE_SYSTEM), {})
    chosen = table.rows(table.decodes > 0)
    assert chosen.latency_s.tolist() == pytest.approx([0.03, 0.04])
    assert all(len(column) == 2 for column in chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE_SYSTEM.replace("latency_ms", "time"), r"missing columns latency_ms; it has: kind, .*, time"),
        (ONE_SYSTEM.replace("prefix", "cached").replace("kind", "type"), "missing columns kind, prefix"),
        (AEGAEON.replace("decode_s", "decode"), "missing columns decode_s"),
        (
            ONE_SYSTEM.replace("\n", ",\n").replace("latency_ms,", "latency_ms,latency_s"),
            "mixed units: it has the columns latency_ms and latency_s; keep one",
        ),
        (ONE_SYSTEM.replace(",30", ",-30"), "line 3: latency_ms must be a number >= 0, not -30"),
        (ONE_SYSTEM.replace(",30", ","), "line 3: latency_ms must be a number >= 0, not nan"),
        (ONE_SYSTEM.replace(",30", ",inf"), "line 3: latency_ms must be a number >= 0, not inf"),
        (ONE_SYSTEM.replace(",30", ",fast"), "line 3: latency_ms must be a number >= 0, not fast"),
        (ONE_SYSTEM.replace("128,512", "-128,512"), "line 2: prefill_tokens must be a number >= 0, not -128"),
        (ONE_SYSTEM.replace(",30", ",0"), r"line 3: latency_ms=0 is 0 s, where a time .*are units mixed\?"),
        (ONE_SYSTEM.replace(",20", ",3700000"), r"line 2: latency_ms=3700000 is 3.7e\+03 s, where a time"),
        (ONE_SYSTEM.replace(",40", ",0.0004"), r"line 4: latency_ms=0.0004 is 4e-07 s, where a time"),
        (ONE_SYSTEM + 12 * "prefill,64,0,0,0,20\n" + "decode,0,0,8,10,0.03\n", r"line 17: .*are units mixed\?"),
        (
            ONE_SYSTEM.replace(",30", ",30000"),
            "mixed units: the fastest decode step takes 30 s and the fastest prefill",
        ),
        (ONE_SYSTEM.replace("mixed", "both"), "kind must be one of prefill, decode, mixed, not both"),
        (
            ONE_SYSTEM.replace("64,0,4", "64,0,0"),
            "line 4: a mixed step cannot have 64 prefill_tokens and 0 decode_seqs",
        ),
        (ONE_SYSTEM.splitlines()[0], "has no rows"),
        ("", "not a CSV table"),
        ("a,b\n1,2\n1,2,3\n", "not a CSV table"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        read_step_table(path, {})
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"table\.csv: No such file"):
        read_step_table(tmp_path / "table.csv", {})
    path = write(tmp_path, AEGAEON)
    with pytest.raises(ConfigError, match="no rows for device=H100; it has: A10, A100"):
        read_step_table(path, {"device": "H100"})
    with pytest.raises(ConfigError, match="holds several systems; choose model among: llama, qwen"):
        read_step_table(path, {"device": "A10"})
    path = write(tmp_path, STEPS)
    with pytest.raises(ConfigError, match="no rows for tp=2; it has: 1"):
        read_step_table(path, {"system": "h100", "tp": 2})
    with pytest.raises(ConfigError, match="choose tp among: 1, 2"):
        read_step_table(path, {"system": "a100"})


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: Is a directory")):
        read_step_table(tmp_path, {})

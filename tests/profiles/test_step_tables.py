from __future__ import annotations

from pathlib import Path

import pytest

from qlm_env.profiles.step_tables import REGIMES, read_aegaeon, read_aiconfigurator
from qlm_env.spec import ConfigError

AEGAEON = """model,device,input_len,batch,prefill_s,decode_s,prefill_p10,n
llama,A10,512,4,0.4,0.04,0,12
llama,A10,512,16,0.9,0.09,0,12
llama,A10,16,130,0.5,0.08,0,12
llama,A100,512,4,0.1,0.01,0,12
qwen,A10,512,4,0.3,0.03,0,12
"""

AICONFIGURATOR = """system,backend,model,tp,kind,prefill_tokens,prefix,decode_seqs,context_len,latency_ms
a100,vllm,llama,1,prefill,128,512,0,0,20
a100,vllm,llama,1,decode,0,0,8,1000,30
a100,vllm,llama,1,mixed,64,0,4,256,40
a100,vllm,llama,2,decode,0,0,8,1000,15
h100,vllm,llama,1,decode,0,0,8,1000,10
"""


def test_an_aegaeon_row_is_a_prefill_step_and_a_decode_step(tmp_path: Path) -> None:
    """The row of 8,192 tokens and the batch of 130, which the engine split, are left out."""
    path = tmp_path / "table.csv"
    path.write_text(AEGAEON)
    table = read_aegaeon(path, "llama", "A10")
    assert [REGIMES[index] for index in table.regime] == ["prefill", "decode"]
    assert table.new_tokens.tolist() == [2048, 4]
    assert table.decodes.tolist() == [0, 4]
    assert table.kv_tokens.tolist() == [0, 4 * 516]
    assert table.attention_tokens2.tolist() == [4 * 512 * 256, 0]
    assert table.latency_s.tolist() == [0.4, 0.04]


def test_an_aiconfigurator_row_is_one_step(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(AICONFIGURATOR)
    table = read_aiconfigurator(path, "llama", "a100", 1)
    assert [REGIMES[index] for index in table.regime] == ["prefill", "decode", "mixed"]
    assert table.new_tokens.tolist() == [128, 8, 68]
    assert table.decodes.tolist() == [0, 8, 4]
    assert table.kv_tokens.tolist() == [0, 8000, 1024]
    assert table.attention_tokens2.tolist() == [128 * (512 + 64), 0, 64 * 32]
    assert table.latency_s.tolist() == [0.02, 0.03, 0.04]


def test_rows_keeps_the_chosen_steps(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(AICONFIGURATOR)
    table = read_aiconfigurator(path, "llama", "a100", 1)
    chosen = table.rows(table.decodes > 0)
    assert chosen.latency_s.tolist() == [0.03, 0.04]
    assert all(len(column) == 2 for column in chosen)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(ConfigError, match=r"table\.csv: No such file"):
        read_aegaeon(path, "llama", "A10")
    path.write_text(AEGAEON)
    with pytest.raises(ConfigError, match="no rows for llama on H100"):
        read_aegaeon(path, "llama", "H100")
    with pytest.raises(ConfigError, match="kind"):
        read_aiconfigurator(path, "llama", "a100", 1)
    path.write_text(AICONFIGURATOR)
    with pytest.raises(ConfigError, match="no rows for llama on a100 tp=4"):
        read_aiconfigurator(path, "llama", "a100", 4)

"""The command that makes the shipped length tables."""

from pathlib import Path

import numpy as np
import pytest

from qlm_env.workload import quantiles
from qlm_env.workload.length_table import load_length_table
from tests.workload.published_data import published_file

SHIPPED = Path(quantiles.__file__).parent / "data"


@pytest.mark.parametrize(
    ("table", "file"),
    [("sharegpt", "lengths/sharegpt_10k_llama2.csv"), ("azure_conv", "traces/azure_2023_conv.csv")],
)
def test_regenerating_a_table_gives_exactly_the_shipped_file(table: str, file: str, tmp_path: Path) -> None:
    made = tmp_path / "new" / "table.yaml"
    quantiles.main([table, str(published_file(file)), "--output", str(made)])
    assert made.read_text() == (SHIPPED / f"{table}.yaml").read_text()
    assert [path.name for path in made.parent.iterdir()] == ["table.yaml"]


@pytest.mark.parametrize("name", sorted(quantiles.PUBLISHED))
def test_shipped_tables_are_quantile_functions(name: str) -> None:
    table = load_length_table(name)
    assert table.probabilities.tolist() == list(quantiles.PROBABILITIES)
    assert table.probabilities[[0, -1]].tolist() == [0.0, 1.0]
    assert np.all(np.diff(table.probabilities) > 0)
    assert table.output_tokens.shape == (quantiles.NUM_PROMPT_BINS, len(quantiles.PROBABILITIES))
    assert np.all(np.diff(table.prompt_tokens) >= 0)
    assert np.all(np.diff(table.output_tokens, axis=1) >= 0)
    assert table.prompt_tokens[0] >= 1
    assert table.output_tokens.min() >= 1


def test_output_quantiles_are_those_of_equally_likely_prompt_ranges() -> None:
    bins = quantiles.NUM_PROMPT_BINS
    prompt = np.repeat(np.arange(1, bins + 1), 10)[::-1]
    table = quantiles.quantile_table(prompt, 100 * prompt)
    assert table.output_tokens.tolist() == [[100.0 * k] * len(quantiles.PROBABILITIES) for k in range(1, bins + 1)]


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,2\n", "num_prefill_tokens,num_decode_tokens\n", "num_prefill_tokens,num_decode_tokens\n1,x\n"],
)
def test_a_file_without_the_columns_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(text)
    with pytest.raises(SystemExit):
        quantiles.main(["sharegpt", str(wrong)])
    assert "whole numbers in columns 'num_prefill_tokens' and 'num_decode_tokens'" in capsys.readouterr().err

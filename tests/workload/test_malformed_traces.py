"""Every way a trace file can be wrong is refused by line and column."""

import gzip
from pathlib import Path

import pytest

from qlm_env.spec import ConfigError
from qlm_env.workload import TraceError, read_trace
from qlm_env.workload.trace_rows import TraceFormat
from tests.workload.sample_traces import AZURE_2023, BURSTGPT_1, MOONCAKE_2025, write


def line(text: str, number: int, replacement: str) -> str:
    lines = text.split("\n")
    lines[number - 1] = replacement
    return "\n".join(lines)


MALFORMED: dict[str, tuple[TraceFormat, str | bytes, int | None, str | None, str]] = {
    "empty file": ("azure", "", None, None, "is empty"),
    "only blank lines": ("mooncake", "\n \n", None, None, "is empty"),
    "only a header": ("azure", AZURE_2023.split("\n")[0], None, None, "holds no requests"),
    "only failed requests": (
        "burstgpt",
        "Timestamp,Request tokens,Response tokens\n1,5,0\n",
        None,
        None,
        "holds no requests: all 1 failed",
    ),
    "missing column": (
        "azure",
        AZURE_2023.replace("GeneratedTokens", "Tokens"),
        1,
        "GeneratedTokens",
        "the column is missing",
    ),
    "column twice": (
        "azure",
        "TIMESTAMP,ContextTokens,ContextTokens,GeneratedTokens\n",
        1,
        "ContextTokens",
        "the column appears twice",
    ),
    "azure read as burstgpt": ("burstgpt", AZURE_2023, 1, "Timestamp", "looks like format: azure"),
    "burstgpt read as azure": ("azure", BURSTGPT_1, 1, "TIMESTAMP", "looks like format: burstgpt"),
    "mooncake read as azure": ("azure", MOONCAKE_2025, 1, "TIMESTAMP", "looks like format: mooncake"),
    "one endless line": ("azure", '{"a": "' + "x" * 200_000, 1, None, "looks like format: mooncake"),
    "azure read as mooncake": ("mooncake", AZURE_2023, 1, None, "looks like format: azure"),
    "too few fields": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:1"),
        3,
        None,
        "has 1 fields, the header has 3",
    ),
    "too many fields": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,1,2,3"),
        3,
        None,
        "has 4 fields, the header has 3",
    ),
    "no date": ("azure", line(AZURE_2023, 3, "yesterday,1,2"), 3, "TIMESTAMP", "'yesterday' is not a date"),
    "impossible date": (
        "azure",
        line(AZURE_2023, 3, "2023-11-31 18:15:50,1,2"),
        3,
        "TIMESTAMP",
        "'2023-11-31 18:15:50' is not a date",
    ),
    "date beyond 64 bits": (
        "azure",
        line(AZURE_2023, 4, "9999-11-16 18:15:50,1,2"),
        4,
        "TIMESTAMP",
        "'9999-11-16 18:15:50' is not a date",
    ),
    "no timestamp": ("azure", line(AZURE_2023, 2, ",1,2"), 2, "TIMESTAMP", "'' is not a date"),
    "no length": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,,2"),
        3,
        "ContextTokens",
        "'' is not a number",
    ),
    "length in words": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,1,two"),
        3,
        "GeneratedTokens",
        "'two' is not a number",
    ),
    "length nan": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,nan,2"),
        3,
        "ContextTokens",
        "'nan' is not a number",
    ),
    "length zero": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,1,0"),
        3,
        "GeneratedTokens",
        "0 is not a length from 1 to",
    ),
    "length negative": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,-7,2"),
        3,
        "ContextTokens",
        "-7 is not a length from 1 to",
    ),
    "length fractional": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,7.5,2"),
        3,
        "ContextTokens",
        "7.5 is not a whole number",
    ),
    "length too long for 32 bits": (
        "azure",
        line(AZURE_2023, 3, "2023-11-16 18:15:50,4294967296,2"),
        3,
        "ContextTokens",
        "4294967296 is not a length from 1 to",
    ),
    "out of order": (
        "azure",
        line(AZURE_2023, 4, "2023-11-16 18:15:50.9951689,1,2"),
        4,
        "TIMESTAMP",
        "is earlier than the row before it",
    ),
    "the line is that of the file, blank lines included": (
        "azure",
        AZURE_2023 + "\n\n2023-11-16 18:15:51,1,x\n",
        7,
        "GeneratedTokens",
        "'x' is not a number",
    ),
    "not UTF-8": ("azure", AZURE_2023.encode() + b"\xff\xfe,1,1\n", 5, None, "is not UTF-8 text"),
    "broken quotes": ("azure", AZURE_2023 + '"2023-11-16 18:15:51,1,1\n', 5, None, "is not CSV"),
    "a quote that is never closed": (
        "burstgpt",
        line(BURSTGPT_1, 2, '5,ChatGPT,472,18,490,"Conversation log'),
        2,
        None,
        "is not CSV",
    ),
    "half a gzip file": (
        "azure",
        gzip.compress(AZURE_2023.encode())[:-9],
        None,
        None,
        "not a complete gzip file",
    ),
    "damaged gzip file": ("azure", b"\x1f\x8b" + b"x" * 50, None, None, "not a complete gzip file"),
    "burstgpt negative": (
        "burstgpt",
        line(BURSTGPT_1, 4, "60,GPT-4,300,-1,299,API log"),
        4,
        "Response tokens",
        "-1 is not a length from 0 to",
    ),
    "burstgpt infinite time": (
        "burstgpt",
        line(BURSTGPT_1, 4, "inf,GPT-4,300,1,301,API log"),
        4,
        "Timestamp",
        "'inf' is not a number",
    ),
    "burstgpt time beyond floats": (
        "burstgpt",
        line(BURSTGPT_1, 6, "1e999,GPT-4,300,1,301,API log"),
        6,
        "Timestamp",
        "'1e999' is not a number",
    ),
    "burstgpt out of order at a failed request": (
        "burstgpt",
        line(BURSTGPT_1, 4, "44,GPT-4,300,0,300,API log"),
        4,
        "Timestamp",
        "is earlier than the row before it",
    ),
    "truncated JSON": ("mooncake", MOONCAKE_2025[:-20], 3, None, "is not JSON"),
    "two objects on a line": ("mooncake", MOONCAKE_2025.replace("}\n", "}", 1), 1, None, "is not JSON"),
    "JSON but no object": ("mooncake", MOONCAKE_2025 + "[1, 2]\n", 4, None, "is not a JSON object"),
    "missing key": (
        "mooncake",
        line(MOONCAKE_2025, 2, '{"timestamp": 0, "input_length": 5}'),
        2,
        "output_length",
        "the key is missing",
    ),
    "null": (
        "mooncake",
        line(MOONCAKE_2025, 2, '{"timestamp": null, "input_length": 5, "output_length": 1}'),
        2,
        "timestamp",
        "null is not a finite number",
    ),
    "text for a number": (
        "mooncake",
        line(MOONCAKE_2025, 2, '{"timestamp": 0, "input_length": "5", "output_length": 1}'),
        2,
        "input_length",
        '"5" is not a finite number',
    ),
    "true for a number": (
        "mooncake",
        line(MOONCAKE_2025, 2, '{"timestamp": 0, "input_length": true, "output_length": 1}'),
        2,
        "input_length",
        "true is not a finite number",
    ),
    "JSON NaN": (
        "mooncake",
        line(MOONCAKE_2025, 2, '{"timestamp": NaN, "input_length": 5, "output_length": 1}'),
        2,
        "timestamp",
        "NaN is not a finite number",
    ),
    "JSON number beyond floats": (
        "mooncake",
        line(MOONCAKE_2025, 3, '{"timestamp": 1' + "0" * 400 + ', "input_length": 5, "output_length": 1}'),
        3,
        "timestamp",
        "is not a finite number",
    ),
    "JSON length zero": (
        "mooncake",
        line(MOONCAKE_2025, 2, '{"timestamp": 0, "input_length": 5, "output_length": 0}'),
        2,
        "output_length",
        "0 is not a length from 1 to",
    ),
    "JSON out of order": (
        "mooncake",
        MOONCAKE_2025 + '{"timestamp": 3051, "input_length": 5, "output_length": 1}',
        4,
        "timestamp",
        "is earlier than the row before it",
    ),
}


@pytest.mark.parametrize(("trace_format", "content", "at_line", "column", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_in_one_line_naming_file_line_and_column(
    trace_format: TraceFormat,
    content: str | bytes,
    at_line: int | None,
    column: str | None,
    problem: str,
    tmp_path: Path,
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TraceError) as caught:
        read_trace(path, trace_format)
    error = caught.value
    where = str(path) + (f", line {at_line}" if at_line else "") + (f", column '{column}'" if column else "")
    assert str(error).startswith(f"{where}: ")
    assert problem in str(error)
    assert "\n" not in str(error)
    assert (error.path, error.line, error.column) == (path, at_line, column)
    assert isinstance(error, ConfigError)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.csv: cannot be read \(No such file"):
        read_trace(tmp_path / "none.csv", "azure")
    with pytest.raises(TraceError, match=r"cannot be read \(Is a directory"):
        read_trace(tmp_path, "azure")

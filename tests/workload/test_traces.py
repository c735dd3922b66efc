"""Trace readers: published files as they are, agreement of the two readers, slices."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_env.spec import ConfigError, MixSpec, ModelSpec, TraceWorkload
from qlm_env.workload import Trace, TraceError, load_trace, read_trace, slice_trace, trace_csv, trace_jsonl
from qlm_env.workload.trace_csv import AZURE, BURSTGPT
from qlm_env.workload.trace_jsonl import MOONCAKE
from qlm_env.workload.trace_rows import RowFormat, TraceFormat
from tests.workload.published_data import published_file
from tests.workload.sample_traces import AZURE_2023, AZURE_2024, BURSTGPT_1, BURSTGPT_3, MOONCAKE_2025, write


def rows(trace: Trace) -> list[tuple[float, int, int]]:
    return list(zip(*(column.tolist() for column in trace[:3]), strict=True))


# --------------------------------------------------------------------------- published files
def test_azure_2023_keeps_all_seven_decimals(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE_2023), "azure")
    assert rows(trace) == [(0.0, 374, 44), (4.314579, 396, 109), (4.314579, 879, 55)]
    assert [column.dtype for column in trace[:3]] == [np.float64, np.int32, np.int32]
    assert trace.num_failed == 0


def test_azure_2024_has_zone_offsets_and_optional_decimals(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE_2024), "azure")
    assert rows(trace) == [(0.0, 1452, 3), (0.011163, 584, 3), (0.169151, 862, 38)]


def test_azure_timestamps_of_different_zones_are_compared_in_utc(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    text += "2024-05-12 02:00:00+02:00,1,1\n2024-05-12 00:00:01Z,1,1\n2024-05-12 00:00:02,1,1\n"
    assert read_trace(write(tmp_path, text), "azure").arrival_s.tolist() == [0.0, 1.0, 2.0]


def test_burstgpt_leaves_out_failed_requests_and_says_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trace = read_trace(write(tmp_path, BURSTGPT_1), "burstgpt")
    assert "left out 2 failed requests" in caplog.text
    assert rows(trace) == [(0.0, 472, 18), (40.0, 1087, 230), (113.0, 417, 276)]
    assert trace.num_failed == 2


def test_burstgpt_time_zero_is_the_first_timestamp_even_of_a_failed_request(tmp_path: Path) -> None:
    text = "Timestamp,Request tokens,Response tokens\n10,5,0\n12.5,6,7\n"
    assert rows(read_trace(write(tmp_path, text), "burstgpt")) == [(2.5, 6, 7)]


def test_burstgpt_columns_are_found_by_name(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, BURSTGPT_3), "burstgpt")
    assert rows(trace) == [(0.0, 906, 446), (51.0, 36, 29)]


def test_mooncake_timestamps_are_milliseconds(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, MOONCAKE_2025), "mooncake")
    assert rows(trace) == [(0.0, 6758, 500), (0.0, 7322, 490), (3.052, 2290, 316)]


def test_fields_may_be_quoted_and_then_span_lines(tmp_path: Path) -> None:
    quoted = BURSTGPT_1.replace("472", '"472"').replace("API log", '"API log,\nnot a conversation"')
    expected = read_trace(write(tmp_path, BURSTGPT_1, "plain"), "burstgpt")
    assert rows(read_trace(write(tmp_path, quoted), "burstgpt")) == rows(expected)


FORMATS: dict[str, tuple[TraceFormat, str]] = {
    "azure-2023": ("azure", AZURE_2023),
    "azure-2024": ("azure", AZURE_2024),
    "burstgpt-1": ("burstgpt", BURSTGPT_1),
    "burstgpt-3": ("burstgpt", BURSTGPT_3),
    "mooncake": ("mooncake", MOONCAKE_2025),
}


@pytest.mark.parametrize(("trace_format", "text"), FORMATS.values(), ids=FORMATS)
def test_line_ends_byte_order_mark_blank_lines_and_gzip_do_not_matter(
    trace_format: TraceFormat, text: str, tmp_path: Path
) -> None:
    expected = read_trace(write(tmp_path, text), trace_format)
    variants = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "no final newline": text.rstrip("\n").encode(),
        "blank lines": text.replace("\n", "\n\n").encode() + b"\r\n\n",
        "gzip": gzip.compress(text.encode()),
    }
    for name, content in variants.items():
        trace = read_trace(write(tmp_path, content, name), trace_format)
        assert rows(trace) == rows(expected), name
        assert trace.num_failed == expected.num_failed


def test_azure_2023_conversation_trace() -> None:
    trace = read_trace(published_file("traces/azure_2023_conv.csv"), "azure")
    assert len(trace.arrival_s) == 19_366
    assert trace.arrival_s[[0, 1, -1]].tolist() == [0.0, 4.314579, 3501.721937]
    assert (int(trace.prompt_tokens.sum()), int(trace.output_tokens.sum())) == (22_361_870, 4_088_665)


def test_mooncake_conversation_trace() -> None:
    trace = read_trace(published_file("traces/mooncake_conversation.jsonl"), "mooncake")
    assert len(trace.arrival_s) == 12_031
    assert trace.arrival_s[-1] == 3536.999
    assert trace.prompt_tokens.mean() == pytest.approx(12_035.06, abs=0.01)  # the paper's Table 2: 12,035
    assert trace.output_tokens.mean() == pytest.approx(342.62, abs=0.01)  # 343


def test_the_vectorised_reader_reads_many_rows_exactly() -> None:
    n = 200_000
    microseconds = np.cumsum(np.random.default_rng(1).integers(1, 40_000, n))
    stamps = np.datetime_as_string(np.datetime64("2024-05-12", "us") + microseconds.astype("m8[us]"))
    prompt, output = np.arange(n) % 8000 + 1, np.arange(n) % 900 + 1
    lines = map("{}+00:00,{},{}".format, stamps.tolist(), prompt.tolist(), output.tolist())
    content = ("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines)).encode()

    trace = trace_csv.read_columns(content, AZURE)
    assert trace is not None
    assert np.array_equal(trace.arrival_s, (microseconds - microseconds[0]) / 1e6)
    assert np.array_equal(trace.prompt_tokens, prompt)
    assert np.array_equal(trace.output_tokens, output)


# --------------------------------------------------------------------------- the two readers agree
def read_both(content: bytes, row_format: RowFormat) -> tuple[Trace | None, Trace | None]:
    """What the vectorised and the row-by-row reader make of ``content``; ``None`` for a refusal."""
    path = Path("trace")
    try:
        if row_format is MOONCAKE:
            return trace_jsonl.read_columns(content, row_format), trace_jsonl.read_rows(path, content, row_format)
        return (
            trace_csv.read_columns(content, row_format),
            trace_csv.read_rows(path, content, row_format),
        )
    except TraceError:
        reader = trace_jsonl.read_columns if row_format is MOONCAKE else trace_csv.read_columns
        return reader(content, row_format), None


@pytest.mark.parametrize(("trace_format", "text"), FORMATS.values(), ids=FORMATS)
def test_the_vectorised_reader_takes_published_files_and_agrees_with_the_row_reader(
    trace_format: TraceFormat, text: str
) -> None:
    row_format = {"azure": AZURE, "burstgpt": BURSTGPT, "mooncake": MOONCAKE}[trace_format]
    vectorised, by_row = read_both(text.encode(), row_format)
    assert vectorised is not None
    assert by_row is not None
    assert rows(vectorised) == rows(by_row)
    assert vectorised.num_failed == by_row.num_failed


@pytest.mark.parametrize(("trace_format", "text"), FORMATS.values(), ids=FORMATS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_the_vectorised_reader_accepts_the_row_reader_accepts_with_the_same_result(
    trace_format: TraceFormat, text: str, data: st.DataObject
) -> None:
    row_format = {"azure": AZURE, "burstgpt": BURSTGPT, "mooncake": MOONCAKE}[trace_format]
    header_end = 0 if row_format is MOONCAKE else text.index("\n") + 1
    at = data.draw(st.integers(header_end, len(text)))
    removed = data.draw(st.integers(0, 3))
    inserted = data.draw(st.text("0123456789-+.eExXnaNif \t,:\"'{}[]TZ\r\n#", max_size=3))
    content = (text[:at] + inserted + text[at + removed :]).encode()
    vectorised, by_row = read_both(content, row_format)
    if vectorised is not None:
        assert by_row is not None, content
        assert rows(vectorised) == rows(by_row)
        assert vectorised.num_failed == by_row.num_failed


# --------------------------------------------------------------------------- slices
def workload(path: Path | str = "trace", **options: Any) -> TraceWorkload:
    return TraceWorkload.model_validate(
        {
            "kind": "trace",
            "format": "azure",
            "path": str(path),
            "models": [ModelSpec(name="m", architecture="a")],
            "mix": [MixSpec(model="m", slo_class="batch-1")],
            **options,
        }
    )


TEN = Trace(np.arange(10.0), np.arange(1, 11, dtype=np.int32), np.arange(11, 21, dtype=np.int32), 4)


def test_a_slice_is_half_open_and_starts_its_own_time() -> None:
    part = slice_trace(TEN, workload(start_s=2.5, duration_s=3.5))
    assert rows(part) == [(0.5, 4, 14), (1.5, 5, 15), (2.5, 6, 16)]


def test_time_scale_multiplies_gaps_and_max_requests_keeps_the_first() -> None:
    part = slice_trace(TEN, workload(start_s=1, time_scale=0.5, max_requests=3))
    assert part.arrival_s.tolist() == [0.0, 0.5, 1.0]
    assert part.prompt_tokens.tolist() == [2, 3, 4]


def test_without_options_the_trace_is_kept_whole_and_not_shared() -> None:
    part = slice_trace(TEN, workload())
    assert rows(part) == rows(TEN)
    assert not any(np.shares_memory(a, b) for a, b in zip(part[:3], TEN[:3], strict=True))


@pytest.mark.parametrize("options", [{"start_s": 9.5}, {"start_s": 2.5, "duration_s": 0.25}])
def test_an_empty_slice_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"start_s and workload\.duration_s select no request.*0 to 9 s"):
        slice_trace(TEN, workload(**options))


def test_load_trace_reads_and_slices(tmp_path: Path) -> None:
    path = write(tmp_path, AZURE_2023)
    assert rows(load_trace(workload(path, start_s=1))) == [(3.314579, 396, 109), (3.314579, 879, 55)]

"""Makes a quantile table of request lengths from its published file.

Every shipped table (:mod:`qlm_env.workload.length_table`) is the output of this command::

    python -m qlm_env.workload.quantiles sharegpt sharegpt_10k_llama2.csv --output sharegpt.yaml
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from qlm_env.spec import ConfigError
from qlm_env.workload.atomic import atomic_path
from qlm_env.workload.length_table import LengthTable

NUM_PROMPT_BINS = 16
"""Equally likely ranges of the prompt length, each with its own output quantiles."""

PROBABILITIES = (
    *(0.0, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04),
    *(round(0.05 + 0.025 * k, 3) for k in range(37)),
    *(0.96, 0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9995, 1.0),
)
"""Where quantiles are kept: every 2.5 % and densely in both tails, where the mean is decided."""


class PublishedLengths(NamedTuple):
    """A published file of request lengths and the columns that hold them."""

    prompt_column: str
    output_column: str
    source: str
    licence: str


PUBLISHED = {
    "sharegpt": PublishedLengths(
        "num_prefill_tokens",
        "num_decode_tokens",
        "10,000 ShareGPT conversations, Llama-2 tokenizer: sharegpt_10k_llama2.csv of forks of microsoft/vidur",
        "MIT",
    ),
    "azure_conv": PublishedLengths(
        "ContextTokens",
        "GeneratedTokens",
        "Azure LLM inference trace 2023, conversation: AzureLLMInferenceTrace_conv.csv of "
        "Azure/AzurePublicDataset (Patel et al., Splitwise, ISCA 2024)",
        "CC-BY-4.0",
    ),
}


def quantile_table(prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> LengthTable:
    """The table of paired lengths, both of shape (N,); requests of equal prompt stay in file order."""
    probabilities = np.array(PROBABILITIES)
    by_prompt = np.argsort(prompt_tokens, kind="stable")
    return LengthTable(
        probabilities,
        np.quantile(prompt_tokens, probabilities),
        np.stack(
            [np.quantile(part, probabilities) for part in np.array_split(output_tokens[by_prompt], NUM_PROMPT_BINS)]
        ),
    )


def render_table(name: str, path: Path) -> str:
    """The YAML text of table ``name`` made from its published file at ``path``.

    Raises:
        ConfigError: the file is missing or lacks a column.
    """
    published = PUBLISHED[name]
    prompt_tokens, output_tokens = read_lengths(path, published)
    table = quantile_table(prompt_tokens, output_tokens)
    header = {
        "source": published.source,
        "licence": published.licence,
        "num_requests": len(prompt_tokens),
        "mean_prompt_tokens": round(float(prompt_tokens.mean()), 2),
        "mean_output_tokens": round(float(output_tokens.mean()), 2),
    }
    columns = {
        "probabilities": table.probabilities.tolist(),
        "prompt_tokens": table.prompt_tokens.round(1).tolist(),
        "output_tokens": table.output_tokens.round(1).tolist(),
    }
    comment = (
        f"# Quantiles of request lengths. Made by: python -m qlm_env.workload.quantiles {name} <file>\n"
        "# output_tokens has one row per equally likely range of prompt_tokens, shortest first.\n"
    )
    dump = functools.partial(yaml.safe_dump, sort_keys=False, width=110)
    return comment + str(dump(header)) + str(dump(columns, default_flow_style=None))


def read_lengths(path: Path, published: PublishedLengths) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and output tokens of every request in a published file, both of shape (N,).

    Raises:
        ConfigError: the file is missing, lacks a column, or holds something else than whole numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it has no rows")
        columns = [
            np.array([int(row[column]) for row in rows], dtype=np.int64)
            for column in (published.prompt_column, published.output_column)
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected a CSV file with whole numbers in columns {published.prompt_column!r} and "
            f"{published.output_column!r} ({error})"
        ) from None
    return columns[0], columns[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a table, to standard output or to ``--output``."""
    parser = argparse.ArgumentParser(description="Make a quantile table of request lengths.")
    parser.add_argument("table", choices=sorted(PUBLISHED))
    parser.add_argument("csv", type=Path, help="the published file")
    parser.add_argument("--output", type=Path, help="the YAML file to write (default: standard output)")
    options = parser.parse_args(arguments)
    try:
        text = render_table(options.table, options.csv)
    except ConfigError as error:
        parser.error(str(error))
    if options.output is None:
        print(text, end="")
    else:
        with atomic_path(options.output) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

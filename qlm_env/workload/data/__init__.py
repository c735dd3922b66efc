"""Quantile tables of published request lengths; each names its source and its licence."""

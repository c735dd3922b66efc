"""Errors of using the environment wrongly."""

from __future__ import annotations


class InvalidActionError(ValueError):
    """An action that the mask forbids, in strict mode, or one outside the action space."""

"""Policies that learn, and what they need of other libraries; nothing here is imported without the `train` extra."""

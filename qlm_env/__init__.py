"""A Gymnasium environment of LLM serving queue management; importing it registers the ``QLM/...`` ids."""

from qlm_env.registration import register_environments

__version__ = "0.1.0"

register_environments()

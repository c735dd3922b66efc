"""Shipped profiles, one YAML file per device, architecture and tp, written by :mod:`qlm_env.profiles.fit`."""

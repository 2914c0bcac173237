"""Fixtures of the OpenOOD tests, made once a session."""

from .openood_tree import configs, host, loaders, net, run_folder, tree  # noqa: F401

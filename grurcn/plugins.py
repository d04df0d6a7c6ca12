"""Sources, trunks and tasks of a user's own: modules that register them when they are imported (docs/extending.md)."""

import importlib
import os

PLUGINS = "GRURCN_PLUGINS"  # environment variable: names of modules, separated by commas


def import_plugins() -> None:
    """Imports the modules that GRURCN_PLUGINS names. Raises ValueError for one that cannot be imported."""
    for module in filter(None, map(str.strip, os.environ.get(PLUGINS, "").split(","))):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"{PLUGINS}: {module} cannot be imported ({error}); expected modules on Python's path"
            ) from None

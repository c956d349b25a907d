"""Sphinx: MyST pages, furo, every warning an error (`make docs`)."""

from importlib.metadata import version as version_of

project = "engineroom"
copyright = "2026, engineroom contributors"
author = "engineroom contributors"
release = version = version_of("engineroom")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_benchmark"]  # benchmark.md includes the latter
nitpicky = False  # SQLAlchemy's names would need its inventory, and so the network

html_theme = "furo"
html_title = f"engineroom {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # errors.md#not-initialized, on the web and in an editor

default_role = "code"  # docstrings write `name`, as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

"""Sphinx: MyST pages, furo's looks. Built by `nox -s docs`, warnings as errors."""

from __future__ import annotations

import mpsdk

project = "mpsdk"
author = "The mpsdk authors"
copyright = author
version = release = mpsdk.__version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"
html_title = f"mpsdk {version}"
html_show_sourcelink = False
html_show_copyright = False

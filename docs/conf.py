"""The documentation site: README, tutorials, docstrings and the pages beside this file.

The source is the repository's root, since README and tutorials are there. Build it into a folder elsewhere:
``python -m sphinx -W -c docs -d /tmp/doctrees . /tmp/site``.
"""

from __future__ import annotations

import mpchannel

project = "mpchannel"
version = release = mpchannel.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
include_patterns = ["docs/*.md", "docs/*.rst", "tutorials/*.ipynb", "tutorials/README.md"]
root_doc = "docs/index"
html_extra_path = ["root"]
html_theme = "furo"
html_title = f"mpchannel {release}"
nb_execution_mode = "off"  # the outputs are committed, and tests/test_tutorials.py holds them to the code
myst_heading_anchors = 3
autodoc_typehints = "none"

"""How Sphinx builds these pages: `make docs`. Nothing is fetched, neither while building nor by the pages."""

project = "model-compose"
author = "model-compose contributors"
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "model-compose"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
pygments_dark_style = "monokai"

"""Sphinx's settings: `make docs` builds the site from the pages that docs/_build/pages.py lays out.

Nothing is fetched while the site is built or read: no fonts, scripts or badges of other hosts.
"""

project = "keras_lipnext"
author = "The keras_lipnext developers"
copyright = "the keras_lipnext developers, Apache-2.0"

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True  # a reference that leads nowhere is a warning, and `make docs` fails of warnings
add_module_names = False  # the page is the module's
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 72
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_domain_indices = False
html_title = "keras_lipnext"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

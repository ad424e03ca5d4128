"Sphinx's settings; `make docs` runs it through build.py, which lays the sources in docs/_build/src."
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))
from reference import cfg

project,author,copyright,release = cfg['title'],cfg['author'],cfg['copyright'],cfg['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.githubpages', 'typeset']
exclude_patterns = ['**/README.md']
html_math_renderer = 'katex'

nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = 'code', 'hide the code'
nb_ipywidgets_js = {}
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block', 'attrs_inline', 'fieldlist', 'deflist']
myst_heading_anchors = 4
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!gradreg).*')]  # types of other libraries
suppress_warnings = ['myst.header']
maximum_signature_line_length = 50
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = 'hide'
python_display_short_literal_types = True

html_theme = 'sphinx_book_theme'
html_title = 'gradreg'
html_baseurl = cfg['doc_host'] + cfg['doc_baseurl'] + '/'
html_static_path = [str(here/'_static')]
html_css_files = ['site.css']
html_context = dict(default_mode='auto')
html_favicon = html_logo = str(here/'_static/logo.svg')
html_show_sourcelink = html_copy_source = False
html_theme_options = dict(
    repository_url=cfg['git_url'],
    use_repository_button=True,
    use_download_button=False,
    use_fullscreen_button=False,
    show_toc_level=2,
    navbar_start=[],
    navbar_center=[],
    navbar_end=[],
    navbar_persistent=[],
    navigation_with_keys=False,
    logo=dict(text='gradreg', alt_text='gradreg: home'),
    pygments_light_style='a11y-high-contrast-light',
    pygments_dark_style='a11y-high-contrast-dark',
)

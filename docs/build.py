"The site: notebooks as nbdev shows them, pages of this folder, a reference; laid in docs/_build/src and set by Sphinx."

import argparse, os, re, shutil, sys
from html import escape
from itertools import groupby
from pathlib import Path
import nbformat, yaml

here = Path(__file__).resolve().parent
root = here.parent
sys.path.insert(0, str(here))
import answers, reference, tables
from gradreg.claims import all_claims, place
from gradreg.notebooks import study_name
from gradreg.runs import REGULARIZERS
from make_readme import directives
from reference import cfg, github

site = cfg['doc_host'] + cfg['doc_baseurl'] + '/'
colab = f'{github.replace("github.com", "colab.research.google.com/github")}nbs/'

def notebooks():
    return sorted(
        p.relative_to(root / 'nbs')
        for p in (root / 'nbs').rglob('*.ipynb')
        if not {'.ipynb_checkpoints', 'out'} & set(p.parts)
    )

# ---------------------------------------------------------------- a notebook becomes a page

def relink(text, up=''):
    "nbdev's links to names of the package lead into the reference, those to the published site stay within it."
    def target(m): return reference.role(m[1], m[2]) if m[1] in reference.homes() else f'`{m[1]}`'
    text = re.sub(r'\[`([\w.]+)(?:\([^`]*\))?`\]\(https?://[^)\s]*?(\w+)\.html#[\w.]+\)', target, text)
    return re.sub(rf'\]\({site}([\w/]+)\.html', lambda m: f']({up}/{m[1]}', text)

def visible(output):
    "Does the output show anything? Progress bars leave empty ones behind."
    page = ''.join(output.get('data', {}).get('text/html', 'x'))
    return bool(re.sub(r'<style.*?</style>|<[^>]*>|\s', '', page, flags=re.S))

def plain(text):
    "The first sentence of some Markdown without its marks, or nothing where that is code, a table or a quote."
    if re.match(r'[|>`#!:-]|\d\.', text): return ''
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'{[\w:]+}`([^`<]*?)\s*(<[^`]*>)?`', r'\1', text))
    return re.split(r'(?<=[.:!?])\s', re.sub(r'[*`$\\]', '', text).replace('\n', ' '))[0].rstrip(':.')

def documented(cells):
    "The outputs of `show_doc` as Markdown one heading below where they stand, in the order of the source."
    entries = []
    for c in cells:
        text = ''.join(c.outputs[0].data['text/markdown'])
        link, name, code, doc = re.search(
            r'(?:\((https://\S+)\).*?)?\n### (\S+)\n(.*?```python.*?```)(.*)', text, re.S
        ).groups()  # what is defined within something private has no link, and no place here
        if not link: continue
        code = reference.named(re.sub(r'\[`([\w.]+)`\]\([^)]*\)', r'\1', code))
        entries.append((int(link.rpartition('#L')[2]), f'### {name}\n{code}\n\n{relink(doc.strip())} [source]({link})'))
    return '\n\n'.join(o for _,o in sorted(entries))

def is_doc(cell): return cell.cell_type == 'code' and bool(re.search(r'^show_doc\(', cell.source, re.M))

def blocks(cells):
    "Cells with each run of `show_doc` cells joined to one Markdown cell."
    for doc,run in groupby(cells, is_doc):
        if doc: yield nbformat.v4.new_markdown_cell(documented(run))
        else: yield from run

def sentences(text):
    "Lines as they were before `say` wrapped them at 92 characters; nothing where they are a table."
    if re.search(r'^ |\S {2,}\S', text, re.M): return []
    lines,before = [],0
    for line in text.strip('\n').split('\n'):
        if before + 1 + len(line.partition(' ')[0]) > 92: lines[-1] += f' {line}'
        else: lines.append(line)
        before = len(line)
    return lines

def prose(output):
    "What a study prints is text of its page."
    said = sentences(''.join(output.text)) if output.get('name') == 'stdout' else []
    if not said: return output
    page = unbroken(''.join(f'<p>{escape(o)}</p>' for o in said))
    return nbformat.v4.new_output('display_data', {'text/html': f'<div class="said">{page}</div>'})

def is_wide(output):
    "Is it a figure whose smallest letters would have less than 7 pixels on a phone, whose column has 358?"
    svg = ''.join(output.get('data', {}).get('image/svg+xml', ''))
    letters = [100*float(o) for o in re.findall(r'scale\((0?\.\d+) -', svg)]  # a glyph of matplotlib has 100 units
    return bool(letters) and min(letters)*358/float(re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)[1]) < 7

def unbroken(text):
    "No line ends between a number and its interval."
    return text.replace(' ± ', '\u00a0±\u00a0').replace('(n = ', '(n\u00a0=\u00a0').replace('× ', '×\u00a0')

def shown(cell, alt, study):
    "A code cell as the reader sees it: no directives, each image with a text."
    flags = directives(cell.source)
    cell.source = re.sub(r'^#\s*\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    cell.outputs = [prose(o) if study else o for o in cell.outputs if visible(o)]
    for o in cell.outputs:
        for k in {'text/html', 'text/markdown'} & {*o.get('data', {})}:
            o.data[k] = unbroken(''.join(o.data[k]).replace('class="fastprogress"', 'class="dataframe"'))
    folds = {
        'remove-input': flags.get('echo') == 'false' or not cell.source,
        'hide-input': flags.get('code-fold') == 'true',
    }
    tags = [o for o,wanted in folds.items() if wanted][:1]
    image = dict(alt=flags.get('fig-alt') or alt, classes='wide' if any(map(is_wide, cell.outputs)) else 'narrow')
    cell.metadata = dict(mystnb=dict(image=image), tags=tags)
    return cell

def is_folded(cell): return 'hide-input' in cell.metadata.get('tags', ())

def in_one_fold(cells):
    "Folded cells that show nothing are folded with the one after them."
    kept = []
    for c in cells:
        if kept and is_folded(kept[-1]) and not kept[-1].outputs and is_folded(c):
            c.source = f'{kept.pop().source}\n\n{c.source}'
        kept.append(c)
    return kept

def sentence(path):
    "What a notebook says of itself below its title, on one line or on several."
    first = nbformat.read(root/'nbs'/path, 4).cells[0].source
    return ' '.join(re.findall(r'^> ?(.*)', first, re.M))

def beside(study, results):
    "Links from a study to all claims, and to its own among them."
    claims = all_claims(results)
    places = sorted({*map(place, claims[claims.study == study].claim)}, key=lambda o: (not o.startswith('Table'), o))
    own = ', '.join(f'<a href="index.html#{re.sub(r"[^a-z0-9]+", "-", o.lower())}">{o}</a>' for o in places)
    return '[All claims](index.ipynb)' + f', those of {own}' * bool(own)

def page(path, results):
    "The processed notebook as MyST-NB takes it, its title and its one sentence."
    nb = nbformat.read(root/'_proc'/path, 4)
    meta = yaml.safe_load(nb.cells[0].source.strip().strip('-'))
    title,heading,said,cells = meta['title'],meta['title'],'',[]
    name,study = path.as_posix(),path.parent.name == 'studies' and path.stem != 'index'
    for c in blocks(o for o in nb.cells[1:] if 'THIS FILE WAS AUTOGENERATED' not in o.source):
        if c.cell_type == 'markdown':
            c.source = relink(c.source, '..' if path.parent.name else '.')
            if found := re.findall(r'^#+ (.+)', c.source, re.M): heading = found[-1]
            said = plain(c.source.strip().split('\n\n')[-1]) or said
        elif c.cell_type == 'code': c = shown(c, f'Figure in {title}, {heading}. {said}'.strip(), study)
        cells.append(c)
    links = [
        beside(study_name(path), results) * study,
        f'[Open in Colab]({colab}{name})',
        f'JupyterLab: `make lab`, then `{name}`',
    ]
    line,last = ' · '.join(filter(None, links)),tables.runtime(path, results)
    head = f'# {title}\n\n{{.sentence}}\n{relink(sentence(path))}\n\n{{.runs}}\n{line}'
    if last: cells.append(nbformat.v4.new_markdown_cell(f'{{.runs}}\nThis notebook {last}.'))
    lead = nbformat.v4.new_markdown_cell(head)
    nb.cells,nb.metadata['language_info'] = [lead, *in_one_fold(cells)],dict(name='python', pygments_lexer='ipython3')
    return nb,title

# ---------------------------------------------------------------- the sources

def toctree(docs, caption=''):
    named = [f':caption: {caption}'] if caption else []
    return '\n'.join(['```{toctree}', *named, ':hidden:', '', *docs, '```', ''])

def contents(paths, pages):
    "The navigation: what is there, in the order of the book."
    names = [p.with_suffix('').as_posix() for p in paths]
    studies = sorted((o for o in names if o.startswith('studies/')), key=lambda o: (not o.endswith('/index'), o))
    cards = [
        f'regularizers/{o}'
        for o in (*REGULARIZERS, *sorted(o.rpartition('/')[2] for o in pages if o.startswith('regularizers/')))
        if f'regularizers/{o}' in pages
    ]
    parts = {
        'Start': ['Home <self>', 'install', *(o for o in ('slider',) if o in pages)],
        'Use': [
            *(o for o in names if o == 'tutorial'),
            *(o for o in ('training', 'recipes', 'compare') if o in pages),
            *dict.fromkeys(cards),
            'extend',
        ],
        'Results': studies,
        'Chapters': [o for o in names if re.match(r'\d\d_', o)],
        'Reference': ['api/index', 'changelog', 'citation'],
    }
    return '\n'.join(toctree(docs, caption) for caption,docs in parts.items())

def stage_notebooks(src, results, written):
    "All notebooks as pages in their places, so that links hold; path and title of each chapter by its module's name."
    paths,chapters = notebooks(),{}
    for path in paths:
        nb,title = page(path, results)
        if path == Path('index.ipynb'): nb.cells.append(nbformat.v4.new_markdown_cell(contents(paths, written)))
        if re.match(r'\d\d_', path.as_posix()): chapters[path.stem.split('_', 1)[1]] = path.as_posix(),title
        (src/path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, src/path)
    return chapters

def stage(src, results):
    "All sources in one folder."
    from nbdev.serve import proc_nbs
    proc_nbs()
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(
        root / 'nbs', src, ignore=shutil.ignore_patterns('*.ipynb', 'out', 'models', '.*', '*.lock', '*.tmp')
    )  # what notebooks link
    written = {
        p.relative_to(here).with_suffix('').as_posix(): p.read_text(encoding='utf-8')
        for p in here.rglob('*.md')
        if '_build' not in p.parts
    }
    written['changelog'] = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    values = {
        **tables.all_tables(results),
        **answers.all_answers(results, lambda c: tables.cost(c, results), tables.start, tables.networks),
        'slider': tables.slider(results),
    }
    if not values['slider']:
        print(
            'docs: no sin_curves.csv and sin_points.csv among the results, so the site has no slider',
            file=sys.stderr,
        )
        del written['slider']
    chapters = stage_notebooks(src, results, written)
    written.update({f'api/{m}': reference.page(m, *chapters[m]) for m in reference.modules})
    written['api/index'] = reference.index() + toctree(reference.modules)
    for name,text in written.items():
        (src/name).parent.mkdir(parents=True, exist_ok=True)
        (src / f'{name}.md').write_text(
            re.sub(r'^\{\{ *(\w+) *\}\}', lambda m: unbroken(values[m[1]]), text, flags=re.M), encoding='utf-8'
        )

def main():
    from sphinx.cmd.build import build_main
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('--out', type=Path, default=here/'_build', help='folder for sources and pages')
    args.add_argument('--results', type=Path, default=root/'nbs/studies/results', help='folder of result files')
    args = args.parse_args()
    out,results = args.out.resolve(),args.results.resolve()
    os.chdir(root)
    stage(out/'src', results)
    shutil.rmtree(out/'html', ignore_errors=True)  # pages that are no more
    folders = [str(here), '-d', *(str(out/o) for o in ('doctrees', 'src', 'html'))]
    code = build_main(['-q', '-W', '--keep-going', '-E', '-c', *folders])
    if not code: print(out/'html/index.html')
    return code

if __name__ == '__main__': sys.exit(main())

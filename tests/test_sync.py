"What is generated is what the notebooks say; what is exported is documented and proved; what is stored is clean."
import ast, copy, difflib, importlib, inspect, json, os, re, shutil, subprocess, sys
from base64 import b64encode
import pytest
from book import cells, code, has_flag, modules, notebooks, read, root, source
from fastcore.docments import docments

sys.path.insert(0, str(root/'docs'))
from make_readme import note, render

each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)

def outputs(path): return [o for c in code(path) for o in c['outputs']]
def text(output):
    return '\n'.join(''.join(o) for k, o in {**output, **output.get('data', {})}.items() if k.startswith('text'))

# ---------------------------------------------------------------- generated files

@pytest.fixture(scope='module')
def remade(tmp_path_factory):
    "A copy of the sources after `make export`."
    new = tmp_path_factory.mktemp('remade')
    for name in 'settings.ini', 'setup.py', 'Makefile', 'docs/make_readme.py':
        (new/name).parent.mkdir(exist_ok=True)
        shutil.copy(root/name, new/name)
    for path in notebooks:
        (new/path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new/path.relative_to(root))
    (new/'.venv').symlink_to(sys.prefix)
    env = {
        k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL')
    }  # with IN_TEST nbdev exports nothing
    done = subprocess.run(['make', '-o', 'install', 'export'], cwd=new, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return new

def assert_same(new, *patterns):
    got,wanted = [{p.relative_to(d): p.read_bytes() for o in patterns for p in d.glob(o)} for d in (root, new)]
    assert sorted(got) == sorted(wanted), 'run `make export`'
    for p in wanted:
        if got[p] == wanted[p]: continue
        lines = difflib.unified_diff(
            got[p].decode(errors='replace').splitlines(),
            wanted[p].decode(errors='replace').splitlines(),
            'here',
            'after export',
            n=1,
            lineterm='',
        )
        pytest.fail(
            f'run `make export`: {p} would change\n' + '\n'.join(o[:200] for o in list(lines)[:30]), pytrace=False
        )

def test_export_leaves_no_diff(remade): assert_same(remade, 'gradreg/*.py', 'pyproject.toml')
def test_notebooks_are_clean(remade): assert_same(remade, *{str(p.relative_to(root)) for p in notebooks})
def test_readme_is_the_index(remade): assert_same(remade, 'README.md', 'docs/images/readme-*')

def test_readme_shows_what_a_reader_sees():
    def cell(src, *outputs): return dict(cell_type='code', source=src, outputs=list(outputs))
    png = dict(
        output_type='display_data',
        data={'image/png': b64encode(b'dots').decode() + '\n', 'text/plain': ['<Figure>']},
    )
    svg = dict(output_type='display_data', data={'image/svg+xml': ['<svg>\n', '</svg>'], 'text/plain': ['<Figure>']})
    said = dict(output_type='stream', name='stdout', text=['one\n', 'two\n'])
    nb = dict(
        cells=[
            dict(
                cell_type='markdown',
                source=[
                    '# T\n',
                    (
                        'see [a](00_a.ipynb), [b](studies/30_b.ipynb#c), [c](../LICENSE),'
                        ' [d](https://e.org/x.ipynb), [e](#f), `f[0](x)`'
                    ),
                ],
            ),
            dict(cell_type='raw', source='raw'),
            cell('#| hide\nimport secret', said),
            cell(
                ['#| export\n', 'x = 1  # why\n', 'x'],
                dict(output_type='execute_result', data={'text/plain': ['1']}),
            ),
            cell('#|echo:false\n#| fig-alt: a dot: black\nplot()', said, png),
            cell('#| echo: false\nplot()', svg),
        ]
    )
    text,images = render(copy.deepcopy(nb))
    assert (
        text == '\n\n'.join(
            [
                note,
                (
                    '# T\nsee [a](nbs/00_a.ipynb), [b](nbs/studies/30_b.ipynb#c), [c](LICENSE),'
                    ' [d](https://e.org/x.ipynb), [e](#f), `f[0](x)`'
                ),
                '```python\nx = 1  # why\nx\n```',
                '```\n1\n```',
                '```\none\ntwo\n```',
                '![a dot: black](docs/images/readme-1.png)',
                '![figure](docs/images/readme-2.svg)',
            ]
        ) + '\n'
    )
    assert images == {'readme-1.png': b'dots', 'readme-2.svg': b'<svg>\n</svg>'}

# ---------------------------------------------------------------- notebooks

@each_notebook
def test_notebook_opens_with_title_and_sentence(path):
    nb = json.loads(read(path))
    assert re.match(r'# .+\n+> .+', source(nb['cells'][0])), source(nb['cells'][0])[:80]
    assert path.stat().st_size < 400_000 and set(nb['metadata']) == {'kernelspec'}
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])

@each_notebook
def test_outputs_are_stored_and_free_of_errors(
    path,
):  # that they are the outputs of these cells, test_notebooks.py checks
    assert outputs(path), 'execute the notebook before you commit it'
    for o in outputs(path): assert o['output_type'] != 'error' and o.get('name') != 'stderr', o

def links(markdown):
    return re.findall(r'\]\((?!\w+:|#)([^)#\s]+)', re.sub(r'```.*?```|`[^`\n]*`', '', markdown, flags=re.S))

@pytest.mark.parametrize('path', [*notebooks, *root.glob('*.md'), *root.glob('.github/*.md')], ids=lambda p: p.stem)
def test_links_resolve(path):
    markdown = '\n'.join(map(source, cells(path, 'markdown'))) if path.suffix == '.ipynb' else read(path)
    assert not [o for o in links(markdown) if not (path.parent/o).exists()]

def test_no_path_of_one_machine():
    texts = {
        p.name: '\n'.join(
            [*(source(c) for kind in ('code', 'markdown', 'raw') for c in cells(p, kind)), *map(text, outputs(p))]
        )
        for p in notebooks
    }
    plain = [
        p
        for o in (
            '*.py',
            '*.ini',
            '*.md',
            'Makefile',
            '.ci/*',
            '.github/**/*.*',
            'gradreg/*.py',
            'tests/*.py',
            'docs/*.*',
            'nbs/studies/results/*.csv',
        )
        for p in root.glob(o)
    ]
    texts.update({str(p.relative_to(root)): read(p) for p in plain})
    for name, t in texts.items():
        assert not (
            m := re.search(r'(?<![\w.:/>-])/(?:work|root|home|tmp|Users|mnt)/\w.{,60}', t)
        ), f'{name}: {m[0]}'

# ---------------------------------------------------------------- exports

def exported():
    for m in modules:
        mod = importlib.import_module(f'gradreg.{m}')
        for name in mod.__all__: yield pytest.param(m, name, getattr(mod, name), id=f'{m}.{name}')

@pytest.mark.parametrize('module,name,obj', list(exported()))
def test_every_export_is_documented(module, name, obj):
    if not callable(obj): return
    assert obj.__doc__ and not obj.__doc__.startswith(
        f'{name}('
    ), 'no docstring'  # a dataclass without one gets its signature
    if inspect.isclass(obj) and '__init__' not in vars(obj): return
    bare = [
        o
        for o, p in inspect.signature(obj).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and not docments(obj).get(o)
    ]
    assert not bare, f'no comment says what these are: {bare}'

@pytest.mark.parametrize('module,name,obj', list(exported()))
def test_every_export_is_shown_in_its_chapter(module, name, obj):
    if not callable(obj): return
    chapter, = (root/'nbs').glob(f'[0-9][0-9]_{module}.ipynb')
    shown = [source(c) for c in code(chapter) if not has_flag(c, 'hide', 'export', 'exporti')]
    if inspect.isclass(obj):
        shown += [source(c) for c in cells(chapter, 'markdown')]  # a class may be what a function returns
    assert any(re.search(rf'(?<!\w){name}(?!\w)', o) for o in shown), 'no visible cell outside the export uses it'

def test_ruff_is_silent():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', root], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_exports_have_no_star_imports():
    for m in modules:
        for node in ast.walk(ast.parse(read(root/f'gradreg/{m}.py'))):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == '*'), m

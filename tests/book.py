"The notebooks as tests read them."
import ast, json, re
import pytest
from pathlib import Path

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not {'.ipynb_checkpoints', 'out'} & set(p.parts))
chapters = sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb'))
modules = sorted(p.stem for p in (root/'gradreg').glob('[!_]*.py'))

def read(path): return path.read_text(encoding='utf-8')
def source(cell): return ''.join(cell['source'])
def cells(path, kind=None): return [c for c in json.loads(read(path))['cells'] if kind in (None, c['cell_type'])]
def code(path): return cells(path, 'code')
def has_flag(cell, *flags): return bool(re.search(rf'^#\s*\|\s*({"|".join(flags)})\b', source(cell), re.M))
def parsed(text): return ast.parse(re.sub(r'^( *)[%!].*$', r'\1pass', text, flags=re.M))

def execute(runner, path, tmp):
    "Exit code and messages of a process that has run the notebook; its temporary files go to `tmp`."
    err = tmp/'stderr.txt'
    print(json.dumps(dict(path=str(path), tmp=str(tmp), err=str(err))), file=runner.stdin, flush=True)
    return int(runner.stdout.readline()),err.read_text(encoding='utf-8')

def check(runner, path, tmp):
    code,said = execute(runner, path, tmp)
    if code: pytest.fail(f'{path.relative_to(root)}, exit code {code}\n{said[-6000:]}', pytrace=False)

"The notebooks as tests read them."
import ast, json, re
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

"README.md from nbs/index.ipynb: what a reader of the notebook sees, with figures as files beside it."
import base64, json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def directives(source): return re.findall(r'^#\|\s*(.+?)\s*$', source, flags=re.M)
def code(source): return re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n')

def outputs(cell, images):
    "Markdown of a code cell's stored outputs; PNGs are added to `images` under their file name."
    for o in cell['outputs']:
        data = o.get('data', {})
        if 'image/png' in data:
            name = f'readme-{len(images)+1}.png'
            images[name] = base64.b64decode(data['image/png'])
            yield f'![{cell_alt(cell)}](docs/images/{name})'
        elif text := ''.join(o.get('text') or data.get('text/plain', '')): yield f'```\n{text.rstrip()}\n```'

def cell_alt(cell): return next((d.partition(':')[2].strip() for d in directives(''.join(cell['source'])) if d.startswith('fig-alt:')), 'figure')

def render(nb):
    "The README's text and its images by file name."
    parts,images = [],{}
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        flags = directives(source) if cell['cell_type'] == 'code' else []
        if cell['cell_type'] == 'markdown': parts.append(re.sub(r'\]\(((?:studies/)?\w+\.ipynb)\)', r'](nbs/\1)', source))
        elif cell['cell_type'] == 'code' and 'hide' not in flags:
            if 'echo: false' not in flags: parts.append(f'```python\n{code(source)}\n```')
            parts += outputs(cell, images)
    return '<!-- made from nbs/index.ipynb by `make export` -->\n\n' + '\n\n'.join(parts) + '\n',images

if __name__ == '__main__':
    text,images = render(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))
    (root/'docs/images').mkdir(parents=True, exist_ok=True)
    for old in (root/'docs/images').glob('readme-*.png'): old.unlink()
    for name,png in images.items(): (root/'docs/images'/name).write_bytes(png)
    (root/'README.md').write_text(text, encoding='utf-8')

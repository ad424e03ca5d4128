"README.md from nbs/index.ipynb: what a reader of the notebook sees, with figures as files in docs/images."
import json, re
from pathlib import Path
from posixpath import normpath
from gradreg.notebooks import FIGURES

root = Path(__file__).resolve().parents[1]
note = '<!-- made from nbs/index.ipynb by `make export` -->'

def directives(source):
    "The `#| key: value` lines of a cell as a dict; a key alone has the value ''."
    pairs = (o.partition(':') for o in re.findall(r'^#\s*\|(.*)$', source, re.M))
    return {key.strip(): value.strip() for key,_,value in pairs}

def code(source): return re.sub(r'^#\s*\|.*\n?', '', source, flags=re.M).strip()

def relink(markdown):
    "Relative links of a notebook in nbs/, as seen from the root; code stays as it is."
    parts = re.split(r'(```.*?```|`[^`\n]*`)', markdown, flags=re.S)
    parts[::2] = [
        re.sub(r'\]\((?!\w+:|[#/])([^)\s]+)', lambda m: f"]({normpath('nbs/' + m[1])}", o) for o in parts[::2]
    ]
    return ''.join(parts)

def outputs(cell, alt, images):
    "Markdown of a cell's stored outputs; figures go to `images` under their file names."
    for o in cell['outputs']:
        data = o.get('data', {})
        if kind := next((k for k in FIGURES if k in data), None):
            ending,content = FIGURES[kind]
            name = f'readme-{len(images) + 1}.{ending}'
            images[name] = content(''.join(data[kind]))
            yield f'![{alt}](docs/images/{name})'
        elif text := ''.join(data.get('text/markdown', '')): yield relink(text)
        elif text := ''.join(o.get('text') or data.get('text/plain', '')).strip('\n'): yield f'```\n{text}\n```'

def render(nb):
    "The README's text, and its images by file name."
    parts,images = [note],{}
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(relink(source))
        if cell['cell_type'] != 'code' or 'hide' in (flags := directives(source)): continue
        if flags.get('echo') != 'false' and code(source): parts.append(f'```python\n{code(source)}\n```')
        parts += outputs(cell, flags.get('fig-alt', 'figure'), images)
    return '\n\n'.join(parts) + '\n',images

def main():
    text,images = render(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))
    folder = root/'docs/images'
    folder.mkdir(parents=True, exist_ok=True)
    for old in set(folder.glob('readme-*')) - {folder/name for name in images}: old.unlink()
    for name,content in images.items(): (folder/name).write_bytes(content)
    (root/'README.md').write_text(text, encoding='utf-8')

if __name__ == '__main__': main()

"The API reference: a page per module, made from signatures, docments and docstrings."
import ast, importlib, inspect, re
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from fastcore.docments import docments

root = Path(__file__).resolve().parents[1]
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
github = f'{cfg["git_url"]}/blob/{cfg["branch"]}/'
modules = [
    p.stem.split('_', 1)[1]
    for p in sorted((root / 'nbs').glob('[0-9][0-9]_*.ipynb'))
    if (root / f'gradreg/{p.stem.split("_", 1)[1]}.py').exists()
]

@cache
def module(name): return importlib.import_module(f'gradreg.{name}')

@cache
def tree(name):
    return {
        n.name: n
        for n in ast.parse((root / f'gradreg/{name}.py').read_text(encoding='utf-8')).body
        if hasattr(n, 'name')
    }

@cache
def homes():
    "Exported name -> the modules that define it; a chapter may offer names of earlier ones too."
    return {o: [m for m in modules if o in own(m)] for m in modules for o in own(m)}

def own(mod): return [o for o in module(mod).__all__ if o in tree(mod) or not callable(getattr(module(mod), o))]

def role(name, here=None, text=None):
    "A link to an exported name, that of module `here` where several have it; code where there is none."
    found = homes().get(name, [])
    home = here if here in found else found[0] if len(found) == 1 else None
    return f'{{py:obj}}`{text or name} <gradreg.{home}.{name}>`' if home else f'`{text or name}`'

def sentence(obj, here): return prose(inspect.cleandoc(obj.__doc__).rstrip('.') + '.', here)

def prose(text, here):
    "A docstring or a comment as Markdown: names become links, what is no Markdown is escaped."
    parts = re.split(r'(`[^`]*`|\$[^$]+\$)', text)
    parts[::2] = [re.sub(r'([*<\[\]])', r'\\\1', o) for o in parts[::2]]
    return ''.join(role(o.strip('`'), here) if re.fullmatch(r'`\w+`', o) else o for o in parts)

# ---------------------------------------------------------------- errors

def message(node):
    "The text of an error's message, with its expressions in braces."
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return ''.join(
            o.value if isinstance(o, ast.Constant) else f'{{{ast.unparse(o.value)}}}' for o in node.values
        )
    if isinstance(node, ast.BinOp): return message(node.left) + message(node.right)
    return '...'

def calls(node): return {o.id for o in ast.walk(node) if isinstance(o, ast.Name)}

def raises(mod, name, seen=()):
    "(error, message) of a function or class and of the private helpers that it calls."
    node = tree(mod)[name]
    for o in ast.walk(node):
        if isinstance(o, ast.Raise) and isinstance(o.exc, ast.Call) and isinstance(o.exc.func, ast.Name) and o.exc.args:
            if len(re.findall(r'[a-z]{2,}', re.sub(r'{.*?}', '', text := message(o.exc.args[0])))) > 2:
                yield o.exc.func.id, text
    for helper in sorted(h for h in calls(node) if h.startswith('_') and h in tree(mod) and h not in seen):
        yield from raises(mod, helper, (*seen, name, helper))

def passed_on(mod, name):
    "Exported names that are used by a function or class, and that raise errors of their own."
    used = {
        o
        for h in (name, *(o for o in calls(tree(mod)[name]) if o.startswith('_') and o in tree(mod)))
        for o in calls(tree(mod)[h])
    } - {name}
    found = sorted(
        (m, o)
        for o in used
        for m in homes().get(o, [])
        if o in tree(m) and getattr(module(mod), o, None) is getattr(module(m), o)
    )
    return [role(o, m) for m,o in found if any(raises(m, o)) or passed_on(m, o)]

# ---------------------------------------------------------------- entries

short = {
    'torch.': '',
    'nn.modules.module.': 'nn.',
    'functools.': '',
    'collections.abc.': '',
    'pandas.': 'pd.',
    'numpy.': 'np.',
    'pathlib.': '',
}

def placeless(text):
    "A function by its name, not by where it lies in memory."
    return re.sub(
        r'<(?:function|built-in function|bound method) (?:[\w.<>]+\.)?(\w+)(?:\s+at\s+0x[0-9a-f]+|\s+of\s[^>]*)?>',
        r'\1',
        text,
    )

def named(text):
    "`placeless`, and without the package of well-known types."
    text = placeless(text)
    for module, name in short.items(): text = text.replace(module, name)
    return text

def shown(p):
    "A parameter as its signature has it."
    return named(
        str(p.replace(default=p.default.__name__)).replace("'", '') if inspect.isfunction(p.default) else str(p)
    )

def signature(obj, name):
    sig = inspect.signature(obj)
    returns = (
        ''
        if inspect.isclass(obj) or sig.return_annotation is sig.empty
        else f' -> {named(inspect.formatannotation(sig.return_annotation))}'
    )
    return f'{name}({", ".join(map(shown, sig.parameters.values()))}){returns}'

def fields(obj, mod):
    "Parameters and result as field lists."
    docs = {
        **dict(
            re.findall(r'^    (\w+) *:[^#\n]*# (.*)$', inspect.getsource(obj), re.M) if inspect.isclass(obj) else []
        ),
        **{k: v for k, v in docments(obj).items() if v},
    }
    sig = inspect.signature(obj)
    yield from (f':param {o}: {prose(" ".join(docs[o].split()), mod)}' for o in sig.parameters if o in docs)
    if not inspect.isclass(obj) and (result := docs.get('return')):
        yield f':returns: {prose(" ".join(result.split()), mod)}'

def errors(mod, name):
    yield from (f':raises {kind}: `{text.replace("`", "")}`' for kind,text in dict.fromkeys(raises(mod, name)))
    if others := passed_on(mod, name):
        yield f'\nRaises also what {", ".join(others)} raise' + 's' * (len(others) == 1) + '.'

def methods(cls, mod):
    for name,obj in vars(cls).items():
        f = obj.fget if isinstance(obj, property) else obj
        if name.startswith('_') or not inspect.isfunction(f) or not f.__doc__: continue
        kind = 'py:property' if isinstance(obj, property) else 'py:method'
        sig = name if isinstance(obj, property) else re.sub(r'\(self(, )?', '(', signature(f, name))
        params = [o for o in fields(f, mod) if not o.startswith(':param self')]
        yield '\n'.join([f'::::{{{kind}}} {sig}', sentence(f, mod), '', *params, '::::', ''])

def value(obj):
    if not isinstance(obj, dict): return placeless(repr(obj))
    return placeless('{' + ', '.join(f'{k!r}: {getattr(v, "__name__", repr(v))}' for k,v in obj.items()) + '}')

def entry(mod, name, chapter):
    "One exported name."
    obj = getattr(module(mod), name)
    if not callable(obj):
        return (
            f':::::{{py:data}} {name}\n:value: {value(obj)}\n\nDefined in [{chapter[1]}](../{chapter[0]}).\n:::::\n'
        )
    kind = 'class' if inspect.isclass(obj) else 'function'
    bases = [role(b.__name__, mod) for b in getattr(obj, '__bases__', ()) if b.__name__ in homes()]
    line = tree(mod)[name].lineno
    links = (
        f'[Derived and shown in the chapter {chapter[1]}](../{chapter[0]}#{name.lower()}) ·'
        f' [source]({github}gradreg/{mod}.py#L{line})'
    )
    body = [
        sentence(obj, mod) + (f' A kind of {bases[0]}.' if bases else ''),
        '',
        *fields(obj, mod),
        *errors(mod, name),
        '',
        links,
        '',
    ]
    return '\n'.join(
        [
            f':::::{{py:{kind}}} {signature(obj, name)}',
            '',
            *body,
            *(methods(obj, mod) if kind == 'class' else ()),
            ':::::',
            '',
        ]
    )

def page(mod, path, title):
    "The Markdown of a module's page; `path` and `title` are its chapter's."
    mine = module(mod)
    head = (
        f'# gradreg.{mod}\n\n{sentence(mine, mod)} Chapter: [{title}](../{path}).\n\n```{{py:module}}'
        f' gradreg.{mod}\n```\n\n'
    )
    return head + '\n'.join(entry(mod, o, (path, title)) for o in own(mod)) + also(mod)

def index():
    "The Markdown of the table of all names."
    rows = [f'| [gradreg.{m}]({m}.md) | {" ".join(role(o, m) for o in own(m))} |' for m in modules]
    return '\n'.join(
        [
            '# Reference',
            '',
            'Every exported name with its types, shapes and errors, made from the code itself.',
            '',
            '| module | names |',
            '|---|---|',
            *rows,
            '',
        ]
    )

def also(mod):
    "What can be imported from here and is defined elsewhere."
    others = [role(o) for o in module(mod).__all__ if o not in own(mod)]
    return f'\nCan be imported from here too: {", ".join(others)}.\n' if others else ''

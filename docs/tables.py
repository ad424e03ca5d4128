"What pages say in numbers, taken from result files and from docs/*.csv."
import json, re
from dataclasses import asdict
from pathlib import Path
import pandas as pd
from gradreg.rows import load_rows
from gradreg.runs import DATA, REGULARIZERS, Run, resolve

here = Path(__file__).resolve().parent
root = here.parent
networks = {'lenet5': 'LeNet-5', 'cifar_resnet': 'ResNet', 'resnet18': 'ResNet-18'}
plain = asdict(Run())
strengths_of = [*REGULARIZERS, 'strength']
setting = [o for o in plain if o not in (*strengths_of, 'seed')]

def markdown(df):
    "A table; numbers stand at the right."
    rows = [
        df.columns,
        ['--:' if pd.api.types.is_numeric_dtype(df[c]) else '---' for c in df],
        *df.astype(str).to_numpy(),
    ]
    return '\n'.join('| ' + ' | '.join(o) + ' |' for o in rows)

def source(path):
    return [''.join(c['source']) for c in json.loads((root / 'nbs' / path).read_text(encoding='utf-8'))['cells']]

def time(s): return f'{s:.0f} s' if s < 90 else f'{s/60:.0f} min' if s < 5400 else f'{s/3600:.1f} h'

def runtime(path, results):
    "How long a notebook runs and on what: a study by its rows, a chapter by seconds.csv."
    names = (
        dict.fromkeys(re.findall(r"""results\(['"](\w+)['"]\)""", '\n'.join(source(path))))
        if path.parent.name == 'studies'
        else ()
    )
    tables = [pd.read_csv(results/f'{o}.csv') for o in names if (results/f'{o}.csv').exists()]
    if tables := [df for df in tables if 'iters' in df]:
        rows = pd.concat(tables)
        rows = rows[rows.status.isin(['ok', 'diverged'])]
        return (
            f'draws on a file of {len(rows)} runs, {time(rows.seconds.sum())} of training in all'
            f' ({", ".join(rows.device.unique())}, one thread per run, on a machine that often did other work);'
            ' only what is missing is trained'
        )
    measured = pd.read_csv(here/'seconds.csv').set_index('notebook')
    if path.as_posix() not in measured.index: return ''
    o = measured.loc[path.as_posix()]
    return f'runs {time(o.seconds)} on one core ({o.device}, torch {o.torch})'

# ---------------------------------------------------------------- cards

def cost(column, results):
    "A sentence on what a training step costs, from the benchmark's file: LeNet-5, and the network for CIFAR."
    df = pd.read_csv(results/'bench.csv').query("penalty == @column and every == 1 and not captured")
    def ratio(network, fast): # on the first device that the file knows
        rows = df[(df.network == network) & (df.fast == fast)]
        return None if rows.empty else rows.iloc[0]
    o,best,native = ratio('lenet5', False),ratio('cifar_resnet', True),ratio('cifar_resnet', False)
    if o is None:
        steps = 1 + resolve(REGULARIZERS[column]).passes(10)
        return (f'A training step takes **about {steps} times** as long as a plain one with ten classes, by its '
                'backward passes in the input; it was not timed.')
    text = (f'A training step takes **{o.ratio:.1f} times** as long as a plain one, quartiles {o.ratio_q25:.1f} to '
            f'{o.ratio_q75:.1f} ({networks[o.network]}, batch {o.bs}, {o.threads} thread, {o.machine}, {o.device}, '
            f'torch {o.torch})')
    if native is not None:
        other = '' if best is None else f'; {native.ratio:.1f} in plain [PyTorch](../03_double_backward.ipynb)'
        o = native if best is None else best
        text += f', and {o.ratio:.1f} times with the [network for CIFAR](../04_models.ipynb), batch {o.bs}{other}'
    return f'{text}; measured in [What does a penalty cost?](../studies/90_bench.ipynb).'

def authors(name):
    "Strengths that the authors used, as rows; those for a batch sum are turned into those for a mean."
    df = pd.read_csv(here/'strengths.csv', comment='#').query('regularizer == @name')
    lam = df.lam*df.batch.where(df.of == 'sum', 1)
    return pd.DataFrame({'data': df.data, 'network': df.network, 'strength': lam.map('{:g}'.format), 'from': df.source})

def start(column):
    "The strength to begin with: the authors' for small MNIST; '' where they used none."
    return next(iter(authors(REGULARIZERS[column].rpartition(':')[2]).strength), '')

def runs_in(path):
    "The rows of a file of runs; a field that is blank or younger than the file has its default, which its runs had."
    df = load_rows(path)
    if not {'valid', 'seed', 'status'} <= set(df): return pd.DataFrame(columns=[*plain, 'valid', 'status'])
    return df.reindex(columns=dict.fromkeys([*df, *plain])).replace('', None).fillna(plain)

def named(o):
    "A network and how it was trained, in short, from a setting by field."
    known = {'p_drop': 'dropout {:g}', 'bn': 'BatchNorm', 'wd': 'wd {:g}', 'every': 'every={}', 'at': "at='{}'"}
    more = {k: f'{k}={{}}' for k in ('probe', 'shared_probe', 'opt', 'precision')}
    said = [text.format(o[k]) for k,text in (known | more).items() if o[k] != plain[k]]
    return ', '.join([networks.get(o['model'], o['model']), *said])

def tuned(column, results):
    "The strength with the best mean validation metric, where a file holds several strengths of this regularizer alone."
    others = [o for o in strengths_of if o != column]
    for path in sorted(results.glob('*.csv')):
        df = runs_in(path)
        df = df[(df.status == 'ok') & (df[column] > 0) & (df[others] == 0).all(axis=1) & ~df.data.isin(DATA)]
        for key,rows in df.groupby(setting):
            seeds = rows.groupby(column).seed.nunique()
            seeds = seeds[seeds >= 3]  # a grid with one run per cell is no choice, and does not spoil one beside it
            if len(seeds) < 2: continue
            rows = rows[rows[column].isin(seeds.index) & rows.seed.isin(range(seeds.min()))]
            o,mean = dict(zip(setting, key)),rows.groupby(column).valid.mean()
            tried = ', '.join(f'{i:g}' for i in mean.index)
            yield {
                'data': f'{o["data"]}, {o["n_train"]} points',
                'network': named(o),
                'strength': f'{mean.idxmax():g}',
                'from': f'our runs: best on validation points of {tried} ({seeds.min()} seeds)',
            }

def strengths(column, results):
    return markdown(
        pd.concat([authors(REGULARIZERS[column].partition(':')[2]), pd.DataFrame(tuned(column, results))])
    )

def recipe(path):
    "A file of docs/recipes as it stands, the lines that the penalty adds marked."
    code = path.read_text(encoding='utf-8')
    calls = r'(spect_reg|SpectReg|double_backward|outputs_of|fused_attn)\('
    ours = rf'requires_grad_|{calls}|eager|enable_grad|trace_auto|lam\*'
    marked = [i for i,o in enumerate(code.splitlines(), 1) if re.search(ours, o) and 'import' not in o]
    lines = f':emphasize-lines: {",".join(map(str, marked))}'
    return f'```{{code-block}} python\n:caption: docs/recipes/{path.name}\n{lines}\n\n{code}```'

def all_tables(results):
    "Everything that a page may name in double braces on a line of its own."
    return {
        f'{kind}_{c}': o
        for c in REGULARIZERS
        for kind, o in (('strengths', strengths(c, results)), ('cost', cost(c, results)))
    } | {f'recipe_{p.stem}': recipe(p) for p in (here/'recipes').glob('*.py')}

# ---------------------------------------------------------------- the slider

def script_data(data):
    "Data for a script element of a page: what a file says cannot end it, nor begin another."
    return json.dumps(data, separators=(',', ':'), allow_nan=False).replace('<', r'\u003c')

def slider(results):
    "The markup of the interactive figure with its data, or nothing where the study's files are not there."
    files = results/'sin_curves.csv',results/'sin_points.csv'
    if not all(f.exists() for f in files): return ''
    curves,points = map(pd.read_csv, files)
    seed = curves.seed.min()
    curves,points = curves[curves.seed == seed].sort_values(['spect_reg', 'x']),points[points.seed == seed]
    of = lambda df, *cols: {c: df[c].round(4).tolist() for c in cols}
    data = dict(
        points=of(points, 'x', 'y'),
        batch=Run().bs,
        fits=[dict(lam=lam, **of(o, 'x', 'fit', 'slope')) for lam, o in curves.groupby('spect_reg')],
    )
    return (here/'slider.html').read_text(encoding='utf-8').replace('DATA', script_data(data))

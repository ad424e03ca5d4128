"What the runs say of each regularizer, from the files of claims: tables for the cards and the page that compares them."

import re
import pandas as pd
from fastcore.basics import camel2snake
from gradreg import relative_callbacks
from gradreg.claims import SETTINGS, all_claims, claim, gained, told, wording
from gradreg.notebooks import studies
from gradreg.rows import load_rows
from gradreg.runs import REGULARIZERS, resolve
from gradreg.tables import compare
from tables import runs_in

classes = {c: resolve(path) for c,path in REGULARIZERS.items()}
good_for = {
    'double_back': 'labels, and a strength that you can tune',
    'jac_reg': 'few classes, and probabilities that should hold still',
    'frob_reg': 'few classes; a yardstick for SpectReg',
    'spect_reg': 'a strength you cannot tune well, many classes, outputs that are no classes, no labels',
    'confidence_penalty': 'accuracy alone, at no cost: not where probabilities or robustness count',
}

def penalised(cls):
    "What a class penalises: the words of its docstring between the function's name and the source."
    found = re.search(r'`, (.*?)(?: \(|\.?$)', cls.__doc__ or '')
    return found[1] if found else ''

def study(name, text=''):
    "The notebook of a study, as the pages of `docs` link it."
    found,text = studies().get(name),text or name.replace('_', ' ')
    return f'[{text}](../studies/{found.name})' if found else text

def cited(o):
    "A claim, linked to its study, and its place in the paper."
    text,bracket,where = wording(o.claim).replace('|', '/').partition(' (')
    return study(o.study, text) + bracket + where

def table(found, up='../'):
    "Claims as Markdown, the verdict first."
    if found.empty: return '*No run has asked this yet.*'
    lines = [f'| {o.verdict} | {cited(o).replace("../", up)} | {told(o)} | {o.n:g} |' for o in found.itertuples()]
    return '\n'.join(['| verdict | claim | effect, 95 % interval | n |', '|---|---|---|--:|', *lines])

def about(found, column):
    "The claims whose subject is this regularizer."
    names = f'{classes[column].__name__}|the {column.replace("_", " ")}'
    return found[found.claim.str.contains(rf'(?:^|: )(?:{names})\b')]

def tested(results): return all_claims(results).query('n > 0')

def helps(column, results):
    "Does it raise accuracy, or lower the error, and whom does it beat?"
    found = about(tested(results), column)
    return table(
        found[
            found.claim.str.contains(
                r'raises accuracy|beats|is worse than|lowers the log of the test error|is within [\d.]+ of SpectReg'
            )
        ]
    )

def in_short(gains, cost, start):
    "The first lines of a card: what it gained over no penalty, by setting, what it costs and where to start."
    gains = [f'{told(o)} on {o.setting} (n = {o.n:g}, {o.verdict})' for o in gains.itertuples()]
    lines = [
        f'**Gain** over no penalty: {", ".join(gains) or "not measured"}. [More](#does-it-help)',
        f'**Cost:** {cost} [More](#cost)',
        f'**Start** at {start}. [More](#suggested-strengths)' if start else '[Where to start](#suggested-strengths)',
    ]
    return '\\\n'.join(lines)

def bold(text): return re.search(r'\*\*(.*?)\*\*', text)[1]

def among(pattern): return lambda results: table((found := tested(results))[found.claim.str.contains(pattern)], '')

questions = {
    'help': r'raises accuracy|lowers the log of the test error',
    'rivals': r'\bbeats\b|is worse than|is within [\d.]+ of SpectReg|lower log of the error',
    'tolerance': r'(?:tenth|times|twice)\b.*strength|a log of the error',
}

def named(column): return f'[{classes[column].__name__}](regularizers/{column}.md)'

def grid(head, *rows): return '\n'.join(f'| {" | ".join(o)} |' for o in [head, ['---']*len(head), *rows])

def compared(results, cost, start):
    "What each gained, costs and needs, and where to start; `cost`: column -> sentence, `start`: column -> strength."
    gains = {(o.method, o.setting): o for o in gained(tested(results)).itertuples()}
    def gain(c, setting):
        o = gains.get((classes[c].__name__, setting))
        return study(o.study, told(o).removesuffix(' points')).replace('../', '') if o else ''
    def time(c): return bold(cost(c)).removesuffix(' times')
    rows = [[named(c), *(gain(c, o) for o in SETTINGS.values()), time(c), start(c),
             'yes' if cls.needs_labels else 'no'] for c,cls in classes.items()]
    return grid(['points gained on', *SETTINGS.values(), 'step time', 'start at', 'needs labels'], *rows)

def described():
    "What each penalises, by how many backward passes in the input for C classes, and what it is good for."
    def passes(cls):
        n = cls.passes(10)
        return f'{n}' if n == cls.passes(100) else 'C' if n == 10 else f'C - {10 - n}' if n < 10 else f'{n} for C = 10'
    rows = [[named(c), good_for.get(c, ''), penalised(cls), passes(cls)] for c,cls in classes.items()]
    return grid(['regularizer', 'take it for', 'it penalises', 'backward passes'], *rows)

def costs(results, networks):
    "Time of a step in plain ones, in PyTorch and with `fast_double_backward`, and memory, by network and device."
    bench = load_rows(results/'bench.csv').query('every == 1 and not captured')
    where = list(dict.fromkeys(zip(bench.network, bench.device)))
    rows = {(o.penalty, o.network, o.device, o.fast): o for o in bench.itertuples()}
    def cells(c, w):
        slow,fast = (rows.get((c, *w, o)) for o in (False, True))
        return [f'{o:.1f}' if o else '' for o in (slow and slow.ratio, fast and fast.ratio, slow and slow.memory_ratio)]
    head = [f'{networks.get(n, n)}, {device}: {o}' for n,device in where for o in ('time', 'time, fast', 'memory')]
    return grid(['regularizer', *head], *([named(c), *(o for w in where for o in cells(c, w))] for c in classes))

# ---------------------------------------------------------------- the relatives

setting = ['data', 'model', 'n_train', 'wd', 'p_drop', 'iters', 'bs', 'lr', 'n_valid']
tuning = range(3)  # the seeds whose validation points choose a strength
relatives = {
    camel2snake(o): o
    for o in relative_callbacks.__all__
    if isinstance(found := getattr(relative_callbacks, o), type) and found not in classes.values()
}

def by_strength(rows, column):
    "Mean validation score of each strength over the seeds that choose."
    return rows[rows.seed.isin(tuning)].groupby(column).valid.mean()

def runs_of(name, results):
    "A relative's runs on digits, and of those of the paper the ones that share their setting; by method."
    rows = load_rows(results/'relatives.csv').query('penalty == @name')
    if rows.empty: return {}
    beside = runs_in(results/'digits.csv').merge(rows[setting].drop_duplicates())
    alone = beside[beside[list(REGULARIZERS)].drop(columns='spect_reg').eq(0).all(axis=1)]
    best = by_strength(alone[alone.spect_reg > 0], 'spect_reg').idxmax()
    of = {'no penalty': alone[alone.spect_reg == 0], 'SpectReg': alone[alone.spect_reg == best]}
    return {**of, 'the relative': rows[rows.strength == by_strength(rows, 'strength').idxmax()], 'all': rows}

def relative_helps(title, runs):
    "Does it raise accuracy on digits, and does it beat SpectReg there?"
    if not runs: return pd.DataFrame(columns=['claim', 'n'], dtype=str)
    rows = pd.concat([runs[m].assign(method=m, accuracy=100*runs[m].test) for m in list(runs)[:3]])
    asked = [('no penalty', f'digits: {title} raises accuracy'), ('SpectReg', f'digits: {title} beats SpectReg')]
    found = [claim(text, compare(rows, 'method', o, 'accuracy'), 'the relative', 1) for o,text in asked]
    return pd.DataFrame(found).assign(study='relatives')

def relative_strengths(runs):
    "The strength that validation points chose, of which."
    if not runs: return ''
    valid,o = by_strength(runs['all'], 'strength'),runs['all'].iloc[0]
    every = f', every={o.every}' if o.every > 1 else ''
    end = ', at an end of what was tried' if valid.idxmax() in (valid.index.min(), valid.index.max()) else ''
    return '\n'.join(
        [
            '| data | network | strength | from |',
            '|---|---|---|---|',
            f'| {o.data}, {o.n_train} points | LeNet-5{every} | {valid.idxmax():g} | '
            f'our runs: best on validation points of {", ".join(f"{k:g}" for k in valid.index)} '
            f'({len(tuning)} seeds){end} |',
        ]
    )

def relative_cost(title):
    "What the estimates of work count."
    n = getattr(relative_callbacks, title).passes(10)
    return (
        f'With ten classes, [estimates of work](../20_study.ipynb) count a training step as **{1 + n} plain '
        f'step{"s" * (n > 0)}**: one, and {n or "no"} backward pass{"es" * (n != 1)} in the input. '
        "It was not timed; [the benchmark](../studies/90_bench.ipynb) has the paper's penalties."
    )

def relative_answers(results):
    "Claims, strengths and cost of each relative, for its card, and all that were run in one table."
    rows = [['relative', 'over no penalty', 'over SpectReg', 'n', 'a step, by passes', 'best strength'], ['---'] * 6]
    for column,title in relatives.items():
        runs = runs_of(f'gradreg.relative_callbacks:{title}', results)
        found,cost = relative_helps(title, runs),relative_cost(title)
        best = f'{by_strength(runs["all"], "strength").idxmax():g}' if runs else ''
        if runs:
            gain,rival = found.itertuples()
            card = f'[{title}](regularizers/{column}.md)'
            rows.append([card, told(gain), told(rival), f'{gain.n}', bold(cost), best])
        counted = f'a training step counts as {bold(cost)}, by its backward passes.'
        alone = found[:1].assign(setting=SETTINGS['digits'])
        yield f'short_{column}',in_short(alone, counted, best)
        yield f'helps_{column}',table(found)
        yield f'strengths_{column}',relative_strengths(runs)
        yield f'cost_{column}',cost
    yield 'relatives','\n'.join(f'| {" | ".join(o)} |' for o in rows)

def all_answers(results, cost, start, networks):
    "Everything that a page may name in double braces on a line of its own."
    alone = gained(tested(results))
    found = {f'helps_{c}': helps(c, results) for c in classes}
    def short(c):
        mine = alone[alone.method == classes[c].__name__]
        return in_short(mine, f'a training step takes {bold(cost(c))} as long as a plain one.', start(c))
    return {
        **found,
        **{f'short_{c}': short(c) for c in classes},
        **dict(relative_answers(results)),
        **{f'claims_{k}': among(o)(results) for k, o in questions.items()},
        'compared': compared(results, cost, start),
        'described': described(),
        'costs': costs(results, networks),
    }

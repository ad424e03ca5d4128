"What the runs say of each regularizer, from the files of claims: tables for the cards and the page that compares them."

import re
import pandas as pd
from fastcore.basics import camel2snake
from gradreg import relative_callbacks
from gradreg.claims import all_claims, claim, told
from gradreg.notebooks import studies
from gradreg.rows import load_rows
from gradreg.runs import REGULARIZERS
from gradreg.tables import compare

subjects = {
    'double_back': 'DoubleBack',
    'jac_reg': 'JacReg',
    'frob_reg': 'FrobReg',
    'spect_reg': 'SpectReg',
    'confidence_penalty': 'the confidence penalty',
}
facts = {  # what no run has to tell: what is penalised, whether labels are needed
    'double_back': ('the gradient of the loss', 'yes'),
    'jac_reg': ('the Jacobian of the probabilities', 'no'),
    'frob_reg': ('the Jacobian of the logits', 'no'),
    'spect_reg': ('one random projection of the Jacobian of the logits', 'no'),
    'confidence_penalty': ('the negative entropy of the probabilities', 'no'),
}

def study(name):
    "The notebook of a study, as the pages of `docs` link it."
    found = studies().get(name)
    return f'[{name.replace("_", " ")}](../studies/{found.name})' if found else name

def table(found, up='../'):
    "Claims as Markdown, the verdict first."
    if found.empty: return '*No run has asked this yet.*'
    lines = [
        f'| {o.verdict} | {o.claim.replace("|", "/")} | {told(o)} | {o.n:g} | {study(o.study).replace("../", up)} |'
        for o in found.itertuples()
    ]
    return '\n'.join(['| verdict | claim | effect, 95 % interval | n | study |', '|---|---|---|--:|---|', *lines])

def about(found, column):
    "The claims whose subject is this regularizer."
    return found[found.claim.str.contains(rf'(?:^|: ){subjects[column]}\b')]

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

def in_short(found, cost, start):
    "The first lines of a card: what it gained, beside no penalty, what it costs and where to start."
    gains = found[found.claim.str.contains(r'^[^:]*: .*raises accuracy')]
    gains = gains.sort_values('n', ascending=False, kind='stable')
    gains = gains.groupby(gains.claim.str.replace(':.*', '', regex=True), sort=False).head(1).head(2)
    told_of = [f'{told(o)} on {o.claim.partition(":")[0]} (n = {o.n:g}, {o.verdict})' for o in gains.itertuples()]
    lines = [
        f'**Gain** over no penalty: {", ".join(told_of) or "not measured"}. [More](#does-it-help)',
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

def compared(cost, start):
    "What each penalises, needs and costs, and where to start; `cost`: column -> sentence, `start`: column -> strength."
    def named(c): return f'[{subjects[c][0].upper() + subjects[c][1:]}](regularizers/{c}.md)'
    head = ['regularizer', 'a training step, in plain ones', 'start at', 'needs labels', 'penalises']
    rows = [[named(c), bold(cost(c)), start(c), labels, what] for c,(what,labels) in facts.items()]
    return '\n'.join(f'| {" | ".join(o)} |' for o in [head, ['---']*5, *rows])

# ---------------------------------------------------------------- the relatives

setting = ['data', 'model', 'n_train', 'wd', 'p_drop', 'iters', 'bs', 'lr', 'n_valid']
tuning = range(3)  # the seeds whose validation points choose a strength
relatives = {
    camel2snake(o): o
    for o in relative_callbacks.__all__
    if isinstance(getattr(relative_callbacks, o), type)
}

def by_strength(rows, column):
    "Mean validation score of each strength over the seeds that choose."
    return rows[rows.seed.isin(tuning)].groupby(column).valid.mean()

def runs_of(name, results):
    "A relative's runs on digits, and of those of the paper the ones that share their setting; by method."
    rows = load_rows(results/'relatives.csv').query('penalty == @name')
    if rows.empty: return {}
    beside = load_rows(results/'digits.csv').merge(rows[setting].drop_duplicates())
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
        yield f'short_{column}',in_short(found, counted, best)
        yield f'helps_{column}',table(found)
        yield f'strengths_{column}',relative_strengths(runs)
        yield f'cost_{column}',cost
    yield 'relatives','\n'.join(f'| {" | ".join(o)} |' for o in rows)

def all_answers(results, cost, start):
    "Everything that a page may name in double braces on a line of its own."
    claims = tested(results)
    found = {f'helps_{c}': helps(c, results) for c in subjects}
    short = {
        f'short_{c}': in_short(
            about(claims, c), f'a training step takes {bold(cost(c))} as long as a plain one.', start(c)
        )
        for c in subjects
    }
    return {
        **found,
        **short,
        **dict(relative_answers(results)),
        **{f'claims_{k}': among(o)(results) for k, o in questions.items()},
        'compared': compared(cost, start),
    }

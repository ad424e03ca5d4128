"What the runs say of each regularizer, from the files of claims: tables for the cards and the page that compares them."

import re
from gradreg.claims import all_claims, told
from gradreg.notebooks import studies

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

def among(pattern): return lambda results: table((found := tested(results))[found.claim.str.contains(pattern)], '')

questions = {
    'help': r'raises accuracy|lowers the log of the test error',
    'rivals': r'\bbeats\b|is worse than|is within [\d.]+ of SpectReg|lower log of the error',
    'tolerance': r'(?:tenth|times|twice)\b.*strength|a log of the error',
}

def compared(cost, start):
    "What each penalises, needs and costs, and where to start; `cost`: column -> sentence, `start`: column -> strength."
    def short(c): return re.sub(r'.*\*\*(.*?)\*\*.*', r'\1', cost(c))
    def named(c): return f'[{subjects[c][0].upper() + subjects[c][1:]}](regularizers/{c}.md)'
    head = ['regularizer', 'penalises', 'needs labels', 'a training step, in plain ones', 'start at']
    rows = [[named(c), what, labels, short(c), start(c)] for c,(what,labels) in facts.items()]
    return '\n'.join(f'| {" | ".join(o)} |' for o in [head, ['---']*5, *rows])

def all_answers(results, cost, start):
    "Everything that a page may name in double braces on a line of its own."
    found = {f'helps_{c}': helps(c, results) for c in subjects}
    return {
        **found,
        **{f'claims_{k}': among(o)(results) for k, o in questions.items()},
        'compared': compared(cost, start),
    }

"What the site's pages say is true: their code runs, their numbers have a source, their tables name what exists."
import json, re, shutil, sys
from html.parser import HTMLParser
from pathlib import Path
import pandas as pd, pytest
from book import read, root
from fastcore.basics import camel2snake
from gradreg import relative_callbacks
from gradreg.rows import load_rows
from gradreg.runs import REGULARIZERS

docs = root/'docs'
sys.path.insert(0, str(docs))
import answers, tables

pages = sorted(p for p in docs.rglob('*.md') if '_build' not in p.parts)
ids = lambda p: p.stem

def blocks(path): return re.findall(r'^```python\n(.*?)^```$', read(path), re.M | re.S)

@pytest.mark.parametrize('path', [p for p in pages if blocks(p)], ids=ids)  # README's is run in index.ipynb
def test_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {'__name__': path.stem}
    for code in blocks(path): exec(compile(code, str(path), 'exec'), names)

def test_the_diff_of_the_guide_is_its_loop():
    guide = read(docs/'training.md')
    diff, = re.findall(r'^```diff\n(.*?)^```$', guide, re.M | re.S)
    after = ''.join(line[1:] + '\n' for line in diff.splitlines() if line[0] != '-')
    assert after in blocks(docs/'training.md')[0]

headings = [
    'Use as a function',
    'Use in training',
    'Formula',
    'Does it help?',
    'Suggested strengths',
    'Cost',
    'Watch out',
    'Source',
]

def test_each_regularizer_has_a_card():
    for name,path in REGULARIZERS.items():
        card = read(docs/f'regularizers/{name}.md')
        assert card.startswith(f'# {path.partition(":")[2]}\n') and re.findall('^## (.*)', card, re.M) == headings
        assert (
            f'{{{{ strengths_{name} }}}}' in card
            and f'{{{{ cost_{name} }}}}' in card
            and f'{{{{ helps_{name} }}}}' in card
        )

def test_each_relative_has_a_card():
    names = {camel2snake(o) for o in relative_callbacks.__all__ if isinstance(getattr(relative_callbacks, o), type)}
    assert {p.stem for p in docs.glob('regularizers/*.md')} == {*REGULARIZERS, *names}
    for name in names:
        card = read(docs/f'regularizers/{name}.md')
        assert camel2snake(card.split('\n', 1)[0].removeprefix('# ')) == name
        assert re.findall('^## (.*)', card, re.M) == headings and f'{{{{ cost_{name} }}}}' in card

def test_strengths_of_a_batch_sum_become_those_of_the_mean():
    mnist = tables.authors('ConfidencePenalty').iloc[0]
    assert mnist.strength == '0.5' and 'sum' in mnist['from']  # 0.01 of a sum over 50
    assert tables.authors('SpectReg').iloc[0].strength == '0.03'

def rows(lam, valids, **kw):
    base = dict(
        data='digits',
        model='lenet5',
        n_train=100,
        wd=0.0,
        p_drop=0.0,
        bn=False,
        iters=10,
        bs=25,
        probe='gaussian',
        every=1,
        status='ok',
        **dict.fromkeys(REGULARIZERS, 0.0),
    )
    return [{**base, 'spect_reg': lam, 'seed': i, 'valid': v, **kw} for i,v in enumerate(valids)]

def test_tuned_strength_is_the_best_on_validation_points(tmp_path):
    table = lambda o: pd.DataFrame(o).to_csv(tmp_path/'a.csv', index=False)
    table(
        rows(0.1, [0.9, 0.9, 0.9])
        + rows(0.3, [0.8, 0.9, 0.9, 1.0, 1.0, 1.0])
        + rows(1.0, [1.0, 1.0, 1.0], double_back=1.0)
        + rows(3.0, [1.0, 1.0, 1.0], status='diverged')
    )
    (one,) = tables.tuned('spect_reg', tmp_path)  # later seeds, combinations and failed runs do not count
    assert one['strength'] == '0.1' and '0.1, 0.3 (3 seeds)' in one['from'] and one['data'] == 'digits, 100 points'
    table(rows(.1, [.9, .9, .9]))
    assert not list(tables.tuned('spect_reg', tmp_path))  # nothing was chosen from

def test_a_strength_with_one_run_does_not_hide_a_choice():
    (one,) = [
        o
        for o in tables.tuned('double_back', root / 'nbs/studies/results')
        if o['data'] == 'mnist, 2000 points' and o['network'] == 'LeNet-5, dropout 0.5, wd 0.0005'
    ]
    assert '50, 100, 200 (3 seeds)' in one['from'] and '1000' not in one['from']

def test_strengths_of_one_setting_are_compared_and_of_no_other(tmp_path):
    "In the input and in two layers a strength each, with its own step size and own other penalty"
    parts = rows(.1, [.8]*3), rows(1., [.9]*3, at='conv'), rows(2., [.9]*3, lr=.1), rows(3., [.9]*3, strength=1.)
    pd.DataFrame(sum(parts, [])).to_csv(tmp_path/'a.csv', index=False)
    assert not list(tables.tuned('spect_reg', tmp_path))
    pd.DataFrame([*sum(parts, []), *rows(10., [.7]*3, at='conv')]).to_csv(tmp_path/'a.csv', index=False)
    (one,) = tables.tuned('spect_reg', tmp_path)
    assert one['network'] == "LeNet-5, at='conv'" and one['strength'] == '1' and ' 1, 10 (3 seeds)' in one['from']

def test_files_older_than_a_field_and_networks_without_a_title_are_read(tmp_path):
    "A file made before FrobReg and BatchNorm were fields, of somebody's network"
    old = pd.DataFrame([*rows(.1, [.9]*3, model='my_nets:small'), *rows(.3, [.8]*3, model='my_nets:small')])
    old.drop(columns=['frob_reg', 'bn']).to_csv(tmp_path/'a.csv', index=False)
    (one,) = tables.tuned('spect_reg', tmp_path)
    assert one['network'] == 'my_nets:small' and one['strength'] == '0.1'
    assert not list(tables.tuned('frob_reg', tmp_path))

def test_a_penalty_that_nobody_timed_or_used_has_a_card(tmp_path, monkeypatch):
    bench = pd.read_csv(root/'nbs/studies/results/bench.csv')
    bench[bench.penalty != 'frob_reg'].to_csv(tmp_path/'bench.csv', index=False)
    assert '**about 11 times**' in tables.cost('frob_reg', tmp_path) # ten backward passes beside a step of one
    monkeypatch.setitem(REGULARIZERS, 'frob_reg', 'my_reg:GapReg')
    assert tables.start('frob_reg') == ''

def test_cost_is_the_benchmarks():
    bench = pd.read_csv(root/'nbs/studies/results/bench.csv')
    for name in {*REGULARIZERS} & {*bench.penalty}:
        of = lambda network: bench[(bench.network == network) & (bench.penalty == name) & (bench.every == 1)].ratio
        said = tables.cost(name, root/'nbs/studies/results')
        assert f'**{of("lenet5").iloc[0]:.1f} times**' in said and bench.device.iloc[0] in said
        assert all(f'{o:.1f}' in said for o in of('cifar_resnet'))

def test_each_chapter_has_been_timed():
    timed = set(pd.read_csv(docs/'seconds.csv').notebook)
    chapters = {p.name for p in [*(root/'nbs').glob('[0-9][0-9]_*.ipynb'), root/'nbs/index.ipynb']}
    assert not chapters - timed, 'run `make seconds`'

def test_runtime_of_a_study_is_that_of_its_rows(tmp_path):
    text = tables.runtime(Path('studies/30_digits.ipynb'), root/'nbs/studies/results')
    stored = pd.read_csv(root/'nbs/studies/results/digits.csv')
    assert f'{len(stored)} runs, ' in text and f'{stored.seconds.sum()/60:.0f} min' in text and stored.device[0] in text

def test_changelog_and_citation_know_the_version():
    from gradreg import __version__
    assert f'\n## {__version__}' in read(root/'CHANGELOG.md') and 'arXiv:1712.09936' in read(root/'CITATION.cff')

def test_no_caption_without_data(tmp_path): assert tables.slider(tmp_path) == ''

# ---------------------------------------------------------------- what the claims say

def said(tmp_path, *rows):
    pd.DataFrame(rows, columns=['claim', 'n', 'effect', 'ci95', 'verdict']).to_csv(
        tmp_path / 'claims_digits.csv', index=False
    )
    return tmp_path

def test_a_card_shows_the_claims_of_its_regularizer(tmp_path):
    results = said(
        tmp_path,
        ('digits: SpectReg raises accuracy (abstract)', 6, 3.1333, 1.2286, 'confirmed'),
        ('digits: DoubleBack beats SpectReg', 6, -1.0, 0.5, 'contradicted'),
        ('SIN: SpectReg lowers the log of the test error (Table 8)', 10, -0.6931, 0.1, 'confirmed'),
    )
    mine, other = (
        answers.helps('spect_reg', results).splitlines()[2:],
        answers.helps('double_back', results).splitlines()[2:],
    )
    study = '(../studies/30_digits.ipynb)'
    assert mine == [
        f'| confirmed | [digits: SpectReg raises accuracy]{study} (abstract) | +3.13 ± 1.23 points | 6 |',
        f'| confirmed | [SIN: SpectReg lowers the test error]{study} (Table 8) | × 0.50 (0.45 to 0.55) | 10 |',
    ]
    assert len(other) == 1 and 'contradicted' in other[0]

def test_the_page_that_compares_says_what_the_claims_and_the_benchmark_say(tmp_path):
    bench = [('lenet5', 'here', 1, m, False, fast, x, 2 * x) for fast in (False, True) for m, x in
             (('none', 1.), ('spect_reg', 2. + fast), ('frob_reg', 9.))]
    columns = ['network', 'device', 'every', 'penalty', 'captured', 'fast', 'ratio', 'memory_ratio']
    pd.DataFrame(bench, columns=columns).to_csv(tmp_path/'bench.csv', index=False)
    results = said(tmp_path, ('MNIST: SpectReg raises accuracy with weight decay (Table 1)', 6, 0.3, 0.1, 'confirmed'),
                   ('MNIST: SpectReg raises accuracy without weight decay (Table 1)', 6, 0.7, 0.1, 'confirmed'))
    row = lambda text: next(o for o in text.splitlines() if o.startswith('| [SpectReg]')).split(' | ')
    gains = row(answers.compared(results, lambda c: f'{c} costs **3 plain steps**', lambda c: '0.03'))
    assert gains[1:] == ['', '[+0.30 ± 0.10](studies/30_digits.ipynb)', '', '3 plain steps', '0.03', 'no |']
    assert row(answers.costs(results, {'lenet5': 'LeNet-5'}))[1:] == ['2.0', '3.0', '4.0 |']
    passes = [o.split(' | ')[-1].rstrip(' |') for o in answers.described().splitlines()[2:]]
    assert passes[:5] == ['1', 'C - 1', 'C', '1', '0']

def test_what_no_run_has_asked_says_so(tmp_path):
    assert answers.helps('frob_reg', tmp_path) == '*No run has asked this yet.*'

def test_a_result_file_puts_no_script_on_the_page(tmp_path):
    "The data of the slider, found as a browser finds them, are those of the file"
    evil = '1</script><script>alert("x")</script><!--'
    pd.DataFrame({'x': [0., 1.], 'y': [0., 1.], 'seed': 0}).to_csv(tmp_path/'sin_points.csv', index=False)
    curves = {'x': [0., 1.], 'fit': [0., 1.], 'slope': [0., 1.], 'seed': 0, 'spect_reg': evil}
    pd.DataFrame(curves).to_csv(tmp_path/'sin_curves.csv', index=False)
    scripts = []
    class Page(HTMLParser):
        def handle_starttag(self, tag, attrs): scripts.append('') if tag == 'script' else None
        def handle_data(self, data):
            if self.cdata_elem == 'script': scripts[-1] += data
    (page := Page()).feed(tables.slider(tmp_path))
    page.close()
    assert len(scripts) == 2 and json.loads(scripts[0])['fits'][0]['lam'] == evil and scripts[1] == ''

# ---------------------------------------------------------------- a regularizer says itself what a page tells

def test_a_page_says_what_the_docstring_penalises():
    said = answers.described()
    assert "| the squared gradient of each example's own loss |" in said
    assert "| one random projection of the logits' Jacobian |" in said

def test_files_older_than_a_regularizer_serve_the_relatives(tmp_path):
    name,results = 'gradreg.relative_callbacks:TangentProp',root/'nbs/studies/results'
    shutil.copy(results/'relatives.csv', tmp_path)
    digits = load_rows(results/'digits.csv').query('frob_reg == 0').drop(columns='frob_reg')
    digits.to_csv(tmp_path/'digits.csv', index=False)
    found = [{k: len(o) for k,o in answers.runs_of(name, folder).items()} for folder in (results, tmp_path)]
    assert found[0]['SpectReg'] and found[0] == found[1]

def test_a_regularizer_of_another_room_has_all_its_answers(monkeypatch):
    "TwoSided as a built-in penalty: no list of the pages names it"
    from gradreg.relative_callbacks import TwoSided
    monkeypatch.setitem(answers.classes, 'two_sided', TwoSided)
    assert '[TwoSided](regularizers/two_sided.md) |' in (said := answers.described())
    assert "| the distance of the gradient's length from a target | 1 |" in said
    found = pd.DataFrame({'claim': ['digits: TwoSided raises accuracy', 'digits: the two sided raises accuracy',
                                    'digits: DoubleBack raises accuracy']})
    assert len(answers.about(found, 'two_sided')) == 2

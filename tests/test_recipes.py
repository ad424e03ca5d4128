"Each recipe trains with the penalty that it says: its first gradient, worked out again by `torch.func` in float64."
import importlib, os, re, subprocess, sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest, torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

root = Path(__file__).resolve().parents[1]
folder = root/'docs/recipes'
names = sorted(p.stem for p in folder.glob('*.py'))
NEEDS = {'lightning_module': 'lightning', 'hugging_face_trainer': 'transformers', 'accelerate_loop': 'accelerate',
         'skorch_classifier': 'skorch', 'timm_transformer': 'timm'}
SLOW = 'compiled_loss',
ALL = Path(sys.prefix).name == '.venv-recipes'  # where nothing is skipped

def skip_unless_here(name):
    if not ALL and (name in SLOW or not find_spec(NEEDS.get(name, 'torch'))): pytest.skip('`make test-recipes` runs it')

def recipe(name):
    skip_unless_here(name)
    with mock.patch.object(sys, 'path', [str(folder), *sys.path]): return importlib.import_module(name)

# ---------------------------------------------------------------- the first step of a training, watched

class Enough(Exception): pass

def without_dropout(): return mock.patch.object(F, 'dropout', lambda x, *args, **kwargs: x)

@contextmanager
def hooked(called, step):
    hooks = [nn.modules.module.register_module_forward_hook(called, with_kwargs=True),
             register_optimizer_step_pre_hook(step)]
    try:
        with mock.patch('fastai.optimizer.Optimizer.step', step): yield  # it is none of torch's
    finally:
        for h in hooks: h.remove()

def first_step(train):
    "Train up to the first step: what the network, the loss and the probe were given, and the gradients."
    seen,now = SimpleNamespace(batches=[]),{}
    loss,draw = F.cross_entropy,torch.Tensor.normal_
    def keep(**kwargs):
        now.update(kwargs)
        if {'net', 'y', 'v'} <= set(now):
            seen.batches.append(SimpleNamespace(**now))
            now.clear()
    def called(module, args, kwargs, out): # the outermost network comes last
        if list(module.parameters()) and not isinstance(module, DistributedDataParallel):
            keep(net=module, args=args, kwargs=kwargs)
    def compared(z, y, *args, **kwargs):
        if 'net' in now: keep(y=y, options=kwargs)
        return loss(z, y, *args, **kwargs)
    def drew(self, *args, **kwargs):
        v = draw(self, *args, **kwargs)
        if 'net' in now: keep(v=v)  # not at the start of the weights
        return v
    def step(*given): # an optimizer, the arguments of its step
        args,kwargs = given[1:] or ((), {})
        for o in [*args[1:], *kwargs.values()]:
            if o: o()  # skorch and Lightning find the gradients within the step
        seen.net = seen.batches[-1].net
        named = dict(seen.net.named_parameters())
        seen.weights = {k: p.detach().double() for k,p in named.items()}
        seen.grads = {k: p.grad.double() for k,p in named.items() if p.grad is not None}
        raise Enough
    with hooked(called, step), without_dropout(), mock.patch.object(F, 'cross_entropy', compared), \
         mock.patch.object(torch.Tensor, 'normal_', drew), pytest.raises(Enough): train()
    return seen

# ---------------------------------------------------------------- the same, worked out by other means

def of_input(net, batch): return lambda w: batch.args[0].detach().double(), lambda w, x: functional_call(net, w, (x,))

def of_columns(net, batch):
    categories,values = batch.args
    return lambda w: values.detach().double(), lambda w, x: functional_call(net, w, (categories, x))

def embedded(ids, table): return lambda w: F.embedding(ids, w[table])

def of_embeds(net, batch):
    "The words are found again by their rows."
    table = next(k for k,_ in net.named_parameters() if 'word_embeddings' in k)
    given = batch.kwargs['inputs_embeds'].detach().double()[..., None, :]
    ids = (given == net.get_parameter(table)).all(-1).float().argmax(-1)
    return embedded(ids, table), lambda w, x: functional_call(net, w, (), {'inputs_embeds': x}).logits

def of_words(net, batch):
    def outputs(w, x):
        handle = net.embed.register_forward_hook(lambda *_: x)
        try: return functional_call(net, w, batch.args)
        finally: handle.remove()
    return embedded(batch.args[0], 'embed.weight'), outputs

def objective(w, batch, of, lam):
    "Loss plus strength times the mean squared norm of a projected Jacobian."
    inputs,outputs = of
    x = inputs(w)
    slope = grad(lambda x: (batch.v*outputs(w, x)).sum())(x)
    return F.cross_entropy(outputs(w, x), batch.y, **batch.options) + lam*slope.square().sum()/len(x)

def true_gradient(seen, of, lam):
    "Mean over the batches of the step."
    for m in seen.net.double().modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.running_mean = m.running_var = m.num_batches_tracked = None
    with without_dropout():
        found = [grad(objective)(seen.weights, b, of(seen.net.train(), b), lam) for b in seen.batches]
    return {k: sum(o[k] for o in found)/len(found) for k in seen.weights}

def assert_same(given, true):
    "Within what float32 leaves of a sum."
    largest = max(g.abs().max() for g in true.values())
    torch.testing.assert_close({k: true[k] for k in given}, given, rtol=1e-3, atol=1e-5*largest.item())
    assert all(g.abs().max() < 1e-5*largest for k,g in true.items() if k not in given)

# ---------------------------------------------------------------- the recipes

LAM = 0.3  # enough to be seen in the first gradient of each of them
INPUTS = dict(accelerate_loop=of_input, hugging_face_trainer=of_embeds, lightning_module=of_input,
              segmentation=of_input, skorch_classifier=of_input, tabular_fastai=of_columns,
              text_embeddings=of_words, timm_transformer=of_input, validation_penalty=of_input)
SHARE = dict(segmentation=1/24**2)
OPTIONS = dict(hugging_face_trainer=dict(max_grad_norm=0))  # it clips gradients unless told otherwise
EACH = [(name, 1) for name in INPUTS] + [('accelerate_loop', 2), ('hugging_face_trainer', 2)]

@pytest.mark.parametrize('name,n', EACH, ids=lambda o: str(o))
def test_first_gradient_is_that_of_loss_and_penalty(name, n, tmp_path, monkeypatch):
    "n batches to a step"
    monkeypatch.chdir(tmp_path)
    module,options = recipe(name),OPTIONS.get(name, {}) | (dict(gradient_accumulation_steps=n) if n > 1 else {})
    seen,lam = first_step(lambda: module.train(LAM, **options)),LAM*SHARE.get(name, 1)
    assert len(seen.batches) == n
    assert_same(seen.grads, true_gradient(seen, INPUTS[name], lam))
    with pytest.raises(AssertionError): assert_same(seen.grads, true_gradient(seen, INPUTS[name], 0.9*lam))

def test_each_recipe_is_tested(): assert {*INPUTS, 'compiled_loss', 'distributed_data_parallel'} == {*names}

def test_compiled_loss_is_the_loss():
    module = recipe('compiled_loss')
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    x,y,v = torch.randn(25, 64, requires_grad=True), torch.randint(10, (25,)), torch.randn(25, 10)
    module.loss_of(net, x, y, v, LAM).backward()
    batch = SimpleNamespace(args=(x,), y=y, v=v, options={})
    seen = SimpleNamespace(net=net, batches=[batch], weights={k: p.detach().double() for k,p in net.named_parameters()})
    assert_same({k: p.grad.double() for k,p in net.named_parameters()}, true_gradient(seen, of_input, LAM))

def test_compiled_loss_is_what_trains():
    module,steps = recipe('compiled_loss'),[]
    def loss_of(net, x, y, v, lam): return steps.append(lam) or net(x).sum()
    with mock.patch.object(module, 'loss_of', loss_of): module.train(LAM)
    assert steps == [LAM]*30*8

def test_validation_penalty_is_the_projected_jacobian():
    "Under no_grad, in eval mode, with directions that stay; the model trains on as before."
    module = recipe('validation_penalty')
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(), nn.Linear(16, 10)).train()
    with torch.no_grad(): accuracy,penalty = module.validate(net, module.x, module.y)
    assert net.training and all(p.grad is None for p in net.parameters())
    net.eval()
    v = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    rows = torch.einsum('ncd,nc->nd', vmap(jacrev(net))(module.x), v)
    assert penalty == pytest.approx(rows.square().sum(1).mean().item(), rel=1e-4)
    assert accuracy == pytest.approx((net(module.x).argmax(1) == module.y).float().mean().item())

@pytest.mark.parametrize('name', names)
def test_it_is_short_and_fits_the_page(name):
    lines = (folder/f'{name}.py').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 62 and max(map(len, lines)) <= 92

# ---------------------------------------------------------------- run as a reader runs them

TORCHRUN = '-m torch.distributed.run --standalone --nproc-per-node=2'.split()

def run(*args):
    path = os.pathsep.join([str(root), str(root/'tests'), str(folder)])
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    done = subprocess.run([sys.executable, '-W', 'ignore', *args], env=env, capture_output=True, text=True, timeout=3e3)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

@pytest.mark.parametrize('name', names)
def test_it_runs_and_the_slope_falls(name, tmp_path, monkeypatch):
    skip_unless_here(name)
    monkeypatch.chdir(tmp_path)
    said = run(*TORCHRUN*name.startswith('distributed'), str(folder/f'{name}.py'))
    slopes = [float(o) for o in re.findall(r'(?:slope|penalty) ([\d.]+)', said)]
    assert len(slopes) in (2, 6) and 0 < slopes[-1] < 0.75*slopes[len(slopes)//2 - 1], said
    assert 'lam=' in said

RANK = '''
import distributed_data_parallel as module, test_recipes as own
from torch import distributed
distributed.init_process_group('gloo')
seen = own.first_step(lambda: module.train(own.LAM))
true = own.true_gradient(seen, own.of_input, own.LAM)
for k, g in true.items():
    mine = g.clone()
    distributed.all_reduce(g)
    g /= 2
    assert not (mine - g).abs().max() < 1e-4*g.abs().max() or not g.any(), 'each process has data of its own'
own.assert_same(seen.grads, true)
print('averaged')
distributed.destroy_process_group()
'''

def test_two_processes_average_loss_and_penalty(tmp_path):
    (tmp_path/'rank.py').write_text(RANK, encoding='utf-8')
    assert run(*TORCHRUN, str(tmp_path/'rank.py')).count('averaged') == 2

"Jacobian products and penalties against torch.func in float64, over nets, classes, dtypes, shapes; errors; memory"
import copy, gc, inspect, math, pickle, re, weakref
import pytest, torch, torch._dynamo
from fastai.torch_core import TensorImage
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from gradreg import jacobians
from gradreg.jacobians import (NoSecondDerivative, gram_product, jacobian, jacobian_rows, softmax_jacobian, sq_norm,
                               vjp, xent_jacobian)
from gradreg.penalties import (confidence_penalty, contrasts, double_back, frob_reg, gaussian, jac_reg, one_direction,
                               rademacher, spect_reg, sphere)
from nets import F64, NETS, each_net

on_each_device = pytest.mark.parametrize('device', ['cpu', *['cuda']*torch.cuda.is_available()])

# ours: (logits, x, one-hot labels, probe) -> (N,); witness: what of one example's logits is differentiated
PENALTIES = {'double_back': (lambda z, x, y, v: double_back(F.cross_entropy(z, y.argmax(1), reduction='none'), x),
                             lambda z, y, v: -(y*z.log_softmax(0)).sum(0, keepdim=True)),
             'frob_reg': (lambda z, x, y, v: frob_reg(z, x), lambda z, y, v: z),
             'jac_reg': (lambda z, x, y, v: jac_reg(z, x), lambda z, y, v: z.softmax(0)),
             'spect_reg': (lambda z, x, y, v: spect_reg(z, x, v), lambda z, y, v: (z*v).sum(0, keepdim=True))}
each_penalty = pytest.mark.parametrize('name', PENALTIES)

def make(kind, c=3, n=4, dtype=F64, device='cpu', seed=0):
    "A net, inputs that require grad, one-hot labels and a probe"
    torch.manual_seed(seed)
    f, d = NETS[kind]
    y, net, x, v = F.one_hot(torch.randint(c, (n,)), c), f(c), torch.randn(n, *d), torch.randn(n, c)
    net, x, y, v = (o.to(device, dtype) for o in (net, x, y, v))
    return net, x.requires_grad_(), y, v

def witness(net, name, x, y, v):
    "(N,) and the weight gradients of their sum weighted by 1, 2, ..., N: full Jacobians of single examples, in float64"
    net, (x, y, v) = copy.deepcopy(net).double(), (o.detach().double() for o in (x, y, v))
    head, bufs = PENALTIES[name][1], dict(net.named_buffers())
    def pen(ps):
        one = lambda o, y, v: head(functional_call(net, {**ps, **bufs}, (o[None],))[0], y, v)
        return vmap(jacrev(one))(x, y, v).flatten(1).square().sum(1)
    ps = {k: p.detach() for k, p in net.named_parameters()}
    return pen(ps), grad(lambda ps: (pen(ps)*weighting(pen(ps))).sum())(ps)

def weighting(pen): return torch.arange(1, len(pen)+1).to(pen)

def weight_grads(net, pen):
    gs = torch.autograd.grad((pen*weighting(pen)).sum(), list(net.parameters()), allow_unused=True, retain_graph=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(net.named_parameters(), gs)}

def check(got, want, rtol):
    scale = want.abs().max().item() if want.numel() else 0
    assert_close(got.detach().double(), want, rtol=rtol, atol=rtol*max(scale, 1e-8))


# values and weight gradients

@on_each_device
@pytest.mark.parametrize('dtype,rtol', [(torch.float32, 2e-4), (F64, 1e-9)])
@pytest.mark.parametrize('n', [1, 7])
@pytest.mark.parametrize('c', [1, 2, 10])
@each_net
@each_penalty
def test_against_jacrev(name, kind, c, n, dtype, rtol, device):
    net, x, y, v = make(kind, c, n, dtype, device)
    pen = PENALTIES[name][0](net(x), x, y, v)
    value, grads = witness(net, name, x, y, v)
    assert pen.shape == (n,) and pen.dtype == dtype and pen.device == x.device
    check(pen, value, rtol)
    assert (c == 1 and name in ('double_back', 'jac_reg')) or (value > 1e-6).all()  # one class: nothing to doubt
    ours = weight_grads(net, pen)
    for k, g in grads.items(): check(ours[k], g, 5*rtol)

@pytest.mark.parametrize('dtype,rtol', [(torch.float16, 2e-2), (torch.bfloat16, .15)])
@each_net
@each_penalty
def test_half_precision(name, kind, dtype, rtol):
    net, x, y, v = make(kind, 3, 4, dtype)
    try: logits = net(x)
    except RuntimeError as e: pytest.skip(f'this PyTorch has no {dtype} on this CPU: {e}')
    pen = PENALTIES[name][0](logits, x, y, v)
    grads = weight_grads(net, pen)
    value, want = witness(net, name, x, y, v)
    assert pen.dtype == dtype
    check(pen, value, rtol)
    for k, g in want.items(): check(grads[k], g, 2*rtol)

INPUTS = {'1': ((6,), lambda: nn.Linear(6, 5)),
          '2': ((3, 4), lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(6, 5))),
          '3': ((2, 4, 3), lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(12, 5))),
          '4': ((1, 3, 2, 4), lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(12, 5)))}

@pytest.mark.parametrize('dims', INPUTS)
@each_penalty
def test_dimensions_of_an_input(name, dims):
    d, body = INPUTS[dims]
    net = nn.Sequential(body(), nn.Tanh(), nn.Linear(5, 3)).double()
    x, v = torch.randn(4, *d, dtype=F64, requires_grad=True), torch.randn(4, 3, dtype=F64)
    y = torch.eye(3, dtype=F64)[[0, 2, 1, 0]]
    pen = PENALTIES[name][0](net(x), x, y, v)
    value, grads = witness(net, name, x, y, v)
    check(pen, value, 1e-9)
    ours = weight_grads(net, pen)
    for k, g in grads.items(): check(ours[k], g, 1e-9)

def test_one_number_per_example():
    x = torch.randn(5, dtype=F64, requires_grad=True)
    y = torch.stack([x.sin(), x**2], 1)
    J = torch.stack([x.cos(), 2*x], 1)
    assert_close(jacobian(y, x), J)
    assert_close(frob_reg(y, x), J.square().sum(1))
    assert_close(double_back(y[:, 1], x), 4*x**2)
    assert_close(vjp(x.sin(), x, torch.full((5,), 3., dtype=F64)), 3*x.cos())

@each_net
@each_penalty
def test_a_hidden_activation_as_x(name, kind):
    net, x, y, v = make(kind)
    body, head = net[:2], net[2:]
    for inputs in x, x.detach():  # the inputs need no gradient then
        h = body(inputs)
        value, grads = witness(head, name, h, y, v)
        pen = PENALTIES[name][0](head(h), h, y, v)
        check(pen, value, 1e-9)
        ours = weight_grads(head, pen)
        for k, g in grads.items(): check(ours[k], g, 1e-9)

@each_penalty
def test_channels_last(name):
    net, x, y, v = make('conv')
    value, grads = witness(net, name, x, y, v)
    net = net.to(memory_format=torch.channels_last)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert not x.is_contiguous()
    pen = PENALTIES[name][0](net(x), x, y, v)
    check(pen, value, 1e-9)
    ours = weight_grads(net, pen)
    for k, g in grads.items(): check(ours[k], g, 1e-9)

@pytest.mark.parametrize('k', [1, 32])
@each_net
@each_penalty
def test_tensor_subclasses(name, kind, k, monkeypatch):
    monkeypatch.setattr(jacobians, '_rows_per_call', lambda x: k)
    net, x, y, v = make(kind)
    value, _ = witness(net, name, x, y, v)
    image = x.detach().as_subclass(TensorImage).requires_grad_()
    logits = net(image)
    assert type(logits) is TensorImage
    check(PENALTIES[name][0](logits, image, y, v).as_subclass(torch.Tensor), value, 1e-9)

@each_penalty
def test_an_empty_batch(name):
    net, x, y, v = make('mlp')
    x = x[:0].detach().requires_grad_()
    assert PENALTIES[name][0](net(x), x, y[:0], v[:0]).shape == (0,)


# both ways through `jacobian`

@pytest.mark.parametrize('k', [1, 2, 32, 100])
@pytest.mark.parametrize('c', [1, 31, 32, 33, 70])
@each_net
def test_rows_one_by_one_and_batched(kind, c, k, monkeypatch):
    net, x, *_ = make(kind, c, 3)
    monkeypatch.setattr(jacobians, '_rows_per_call', lambda x: k)
    J = jacobian(net(x), x)
    want = vmap(jacrev(lambda o: net(o[None])[0]))(x.detach())
    assert J.shape == (3, c, *x.shape[1:])
    assert_close(J, want)
    r = torch.randn_like(want)  # any function of the Jacobian, not only a norm, has right weight gradients
    ours = torch.autograd.grad((J.sin()*r).sum(), net[0].weight)[0]
    def f(w):
        one = lambda o: functional_call(net, {'0.weight': w}, (o[None],))[0]
        return (vmap(jacrev(one))(x.detach()).sin()*r).sum()
    assert_close(ours, grad(f)(net[0].weight.detach()))

@on_each_device
@pytest.mark.parametrize('kind,c', [('mlp', 32), ('mlp', 33), ('mlp', 200), ('conv', 33)])
def test_python_calls_do_not_grow_with_every_class(kind, c, device, monkeypatch):
    net, x, *_ = make(kind, c, 3, torch.float32, device)
    logits, calls, autograd_grad = net(x), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a, **kw: (calls.append(1), autograd_grad(*a, **kw))[1])
    jacobian(logits, x)
    assert len(calls) == (c if kind == 'conv' and device == 'cpu' else -(-c//32))

@on_each_device
@pytest.mark.parametrize('k', [1, 32])
@each_net
def test_rows_of_ones_own(kind, k, device, monkeypatch):
    net, x, *_ = make(kind, 5, device=device)
    y, rows = net(x), torch.randn(40, 5, dtype=F64, device=device)
    monkeypatch.setattr(jacobians, '_rows_per_call', lambda x: k)
    assert_close(jacobian(y, x, rows), torch.einsum('kc,nc...->nk...', rows, jacobian(y, x)))

@pytest.mark.parametrize('shape', [(0, 3), (2, 4), (3,), (4, 1, 3)])
def test_wrong_rows(shape):
    net, x, *_ = make('mlp')
    said = f'rows has shape {shape}, but y has (4, 3): (K,3) with K at least 1'
    with pytest.raises(ValueError, match=re.escape(said)):
        jacobian(net(x), x, torch.ones(shape, dtype=F64))

@pytest.mark.parametrize('f,c,passes', [(frob_reg, 10, 10), (jac_reg, 10, 9), (jac_reg, 2, 1), (jac_reg, 1, 1)])
def test_number_of_backward_passes(f, c, passes, monkeypatch):
    net, x, *_ = make('mlp', c)
    logits, n = net(x), []
    monkeypatch.setattr(jacobians, '_rows_per_call', lambda x: 1)
    logits.register_hook(lambda g: n.append(1))
    f(logits, x)
    assert len(n) == passes

@pytest.mark.parametrize('k', [1, 32])
def test_batched_rows_in_train_mode(k, monkeypatch):
    "BatchNorm, dropout and max pooling, rows by the independent loop over one graph"
    monkeypatch.setattr(jacobians, '_rows_per_call', lambda x: k)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(.5),
                        nn.Linear(16, 35)).double()
    x = torch.randn(4, 2, 6, 6, dtype=F64, requires_grad=True)
    y = net.train()(x)
    want = torch.stack([torch.autograd.grad(y[:, i].sum(), x, create_graph=True)[0] for i in range(35)], 1)
    J = jacobian(y, x)
    assert_close(J, want)
    ps = list(net.parameters())[:-1]
    grads = [torch.autograd.grad(o.square().sum(), ps, retain_graph=True, materialize_grads=True) for o in (J, want)]
    assert_close(*grads)


# one forward pass

@each_penalty
def test_dropout_mask_is_that_of_the_forward_pass(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.Dropout(.5), nn.Linear(20, 3)).double().train()
    calls, seen = [], {}
    net.register_forward_hook(lambda *_: calls.append(1))
    net[1].register_forward_hook(lambda m, i, o: seen.update(mask=(o != 0)/.5))
    x, v = torch.randn(4, 6, dtype=F64, requires_grad=True), torch.randn(4, 3, dtype=F64)
    y = torch.eye(3, dtype=F64)[[0, 1, 2, 0]]
    logits = net(x)
    J = torch.einsum('ch,nh,hd->ncd', net[2].weight, seen['mask'].double(), net[0].weight)
    p = logits.softmax(1)
    J_f = torch.einsum('nij,njd->nid', torch.diag_embed(p) - p[:, :, None]*p[:, None], J)
    want = {'double_back': torch.einsum('nc,ncd->nd', p - y, J), 'frob_reg': J, 'jac_reg': J_f,
            'spect_reg': torch.einsum('nc,ncd->nd', v, J)}[name]
    assert_close(PENALTIES[name][0](logits, x, y, v), want.flatten(1).square().sum(1))
    assert len(calls) == 1
    assert not torch.allclose(net(x), logits)  # a second pass would have had another mask

def test_batchnorm_in_train_mode():
    "What comes back holds the influence on all outputs of the batch, and the running statistics move once"
    torch.manual_seed(0)
    bn = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().train()
    x, v = torch.randn(6, 5, dtype=F64, requires_grad=True), torch.randn(6, 3, dtype=F64)
    twin = copy.deepcopy(bn)
    full = torch.autograd.functional.jacobian(twin, x.detach())  # (N,C,N,D)
    logits = bn(x)
    assert_close(spect_reg(logits, x, v), torch.einsum('mcnd,mc->nd', full, v).square().sum(1))
    assert_close(vjp(logits, x, torch.ones_like(v)), full.sum((0, 1)))
    assert bn[1].num_batches_tracked == 1
    bn.eval()
    check(frob_reg(bn(x), x), witness(bn, 'frob_reg', x, v, v)[0], 1e-9)


# exact penalties where examples are not independent

def batch_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().train()
    return net, torch.randn(6, 5, dtype=F64, requires_grad=True)

def whole_batch(f, x): return torch.autograd.functional.jacobian(f, x.detach())  # (N,C,N,D): each output by each input

@pytest.mark.parametrize('name,head', [('frob_reg', lambda z: z), ('jac_reg', lambda z: z.softmax(1))])
def test_mean_and_variance_of_the_signs(name, head):
    "Expectation: squared derivatives of all outputs; variance: of rows of the same number in pairs of examples"
    net, x = batch_net()
    f, rows = {'frob_reg': (frob_reg, torch.eye(3, dtype=F64)),
               'jac_reg': (jac_reg, contrasts(x[:, :3].detach()))}[name]
    full = torch.einsum('kc,mcnd->nmkd', rows, whole_batch(lambda x: head(net(x)), x))
    gram = torch.einsum('nmkd,nlkd->nkml', full, full)
    mean = full.square().sum((1, 2, 3))
    var = 2*(gram.square().sum((1, 2, 3)) - gram.diagonal(dim1=2, dim2=3).square().sum((1, 2)))
    logits, draws, g = net(x), 3000, torch.Generator().manual_seed(1)
    with torch.no_grad(): got = torch.stack([f(logits, x, generator=g) for _ in range(draws)])
    assert ((got.mean(0) - mean).abs() < 4*(var/draws).sqrt()).all()
    se = ((got - mean)**4).mean(0).sqrt()/draws**.5
    assert ((got.var(0) - var).abs() < 4*se).all() and (var > 4*se).all()
    shared = full.sum(1).square().sum((1, 2))  # what rows that all examples share would give
    assert ((shared - mean).abs() > 4*(var/draws).sqrt()).all()

def test_one_draw_of_signs_by_hand():
    net, x = batch_net()
    signs = torch.randint(2, (3, 6), generator=torch.Generator().manual_seed(5))*2. - 1
    want = torch.einsum('km,mknd->nkd', signs.double(), whole_batch(net, x)).square().sum((1, 2))
    assert_close(frob_reg(net(x), x, generator=torch.Generator().manual_seed(5)), want)

@pytest.mark.parametrize('f', [frob_reg, jac_reg])
def test_signs_have_an_owner(f):
    "The global generator stays untouched; a given one repeats; without one each call has other signs"
    net, x = batch_net()
    logits, state = net(x), torch.get_rng_state()
    a, b = f(logits, x), f(logits, x)
    assert not torch.equal(a, b)
    a, b = (f(logits, x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)

@each_net
@pytest.mark.parametrize('c', [1, 3, 40])
def test_signs_change_no_bit_where_examples_are_independent(kind, c):
    net, x, *_ = make(kind, c)
    y = net(x)
    for dtype_net in (net, net.float()):
        x = x.detach().to(next(net.parameters()).dtype).requires_grad_()
        y = dtype_net(x)
        plain = sum(sq_norm(J) for J in jacobians.jacobian_rows(y, x))
        for _ in range(3): assert torch.equal(frob_reg(y, x), plain)


# grad mode and graphs

@each_net
@each_penalty
def test_grad_mode(name, kind):
    net, x, y, v = make(kind)
    logits, f = net(x), PENALTIES[name][0]
    losses = F.cross_entropy(logits, y, reduction='none')  # made here: under no_grad it would have no graph
    pen = lambda: double_back(losses, x) if name == 'double_back' else f(logits, x, y, v)
    want = f(logits, x, y, v)
    with torch.no_grad():
        got = pen()
        assert not got.requires_grad and got.grad_fn is None
        with torch.enable_grad(): again = pen()
        assert again.requires_grad
    assert_close(got, want.detach())
    assert_close(weight_grads(net, again), weight_grads(net, want))

@each_penalty
def test_the_graph_stays_for_the_loss(name):
    net, x, y, v = make('conv')
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    alone = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    PENALTIES[name][0](logits, x, y, v)
    (loss + 0*PENALTIES[name][0](logits, x, y, v).mean()).backward()
    assert_close([p.grad for p in net.parameters()], list(alone))

@each_net
@each_penalty
def test_no_nan_at_a_zero_jacobian(name, kind):
    net, x, y, v = make(kind)
    for p in net.parameters(): nn.init.zeros_(p)
    pen = PENALTIES[name][0](net(x), x, y, v)
    assert_close(pen, torch.zeros_like(pen))
    assert all(g.isfinite().all() for g in weight_grads(net, pen).values())

@pytest.mark.filterwarnings('ignore:Using backward')
@each_penalty
def test_memory_does_not_grow(name):
    "Without the help of the cycle collector, the inputs die at the end of a step"
    net, f = make('conv')[0], PENALTIES[name][0]
    def step(create_graph=False):
        _, x, y, v = make('conv')
        logits = net(x)
        loss = F.cross_entropy(logits, y, reduction='none')
        if create_graph: loss.mean().backward(create_graph=True)
        else: (loss + f(logits, x, y, v)).mean().backward()
        return weakref.ref(x)
    gc.disable()
    try:
        assert [step()() for _ in range(3)] == [None]*3
        assert step(create_graph=True)() is not None  # the way that leaks, and the proof that a leak would be seen
    finally: gc.enable()
    for p in net.parameters(): p.grad = None


# errors

def others(name):
    "The penalty as a function of what it differentiates and x"
    return {'double_back': lambda z, x: double_back(z.logsumexp(1), x),
            'vjp': lambda z, x: vjp(z, x, torch.ones_like(z)),
            'jacobian': jacobian, 'frob_reg': frob_reg, 'jac_reg': jac_reg, 'spect_reg': spect_reg}[name]

@pytest.mark.parametrize('x,error,match', [
    (lambda x: x.detach(), ValueError, r'x does not require grad: call x.requires_grad_\(\) before'),
    (lambda x: x.clone(), ValueError, 'does not depend on x: x must be the very tensor'),
    (lambda x: torch.zeros_like(x, requires_grad=True), ValueError, 'does not depend on x'),
    (lambda x: x.detach().long(), ValueError, 'x is torch.int64, .*float tensor'),
    (lambda x: x.detach() > 0, ValueError, 'x is torch.bool'),
    (lambda x: (x, x), TypeError, 'x is a tuple, not a tensor: call once for each input'),
    (lambda x: [x], TypeError, 'x is a list'), (lambda x: None, TypeError, 'x is a NoneType'),
    (lambda x: x.detach().numpy(), TypeError, 'x is a ndarray'),
    (lambda x: x[:2], ValueError, r'y \(4, 3\) and x \(2, 12\) must agree in the first axis'),
    (lambda x: x.sum(), ValueError, r'x \(\) must agree')])
@pytest.mark.parametrize('name', ['vjp', 'jacobian', 'double_back', 'frob_reg', 'jac_reg', 'spect_reg'])
def test_wrong_x(name, x, error, match):
    net, right, *_ = make('mlp')
    if name == 'double_back': match = match.replace(r'\(4, 3\)', r'\(4,\)')
    logits = net(right)
    with pytest.raises(error, match=match): others(name)(logits, x(right))
    others(name)(logits, right)  # and the right one is still taken

@pytest.mark.parametrize('name', ['vjp', 'jacobian', 'double_back', 'frob_reg', 'jac_reg', 'spect_reg'])
def test_y_without_graph(name):
    net, x, *_ = make('mlp')
    with torch.no_grad(): logits = net(x)
    for y in logits, net(x).detach():
        with pytest.raises(ValueError, match='y has no graph: compute it from x with gradients'): others(name)(y, x)

@pytest.mark.parametrize('v,shape', [  # most of them would broadcast, silently
    (lambda v: v[:, :1], r'\(4, 1\)'), (lambda v: v[0], r'\(3,\)'), (lambda v: v[:1], r'\(1, 3\)'),
    (lambda v: v[..., None], r'\(4, 3, 1\)'), (lambda v: v.sum(), r'\(\)')])
def test_wrong_probe(v, shape):
    net, x, _, right = make('mlp')
    for f in (vjp, lambda y, x, v: spect_reg(y, x, v)):
        with pytest.raises(ValueError, match=rf'v has shape {shape}, but y has \(4, 3\): one entry of v'):
            f(net(x), x, v(right))

@pytest.mark.parametrize('reduce,shape', [(torch.mean, r'\(\)'), (torch.sum, r'\(\)'),
                                          (lambda l: l[:, None], r'\(4, 1\)')])
def test_reduced_losses(reduce, shape):
    net, x, y, _ = make('mlp')
    losses = F.cross_entropy(net(x), y, reduction='none')
    with pytest.raises(ValueError, match=f"losses has shape {shape}, .*reduction='none'"):
        double_back(reduce(losses), x)

@pytest.mark.parametrize('f', [jacobian, frob_reg, jac_reg])
def test_outputs_that_are_no_matrix(f):
    net, x, *_ = make('mlp')
    with pytest.raises(ValueError, match=r'y has shape \(4, 3, 2\), .*one backward pass, y.flatten\(1\) takes 6'):
        f(net(x)[..., None].expand(-1, -1, 2), x)

class Checkpointed(nn.Sequential):
    def forward(self, x): return checkpoint(super().forward, x, use_reentrant=False)

class Watched(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda g: g*(g.norm().item() >= 0))
        return y

def dropped(): return nn.Linear(6, 8), nn.Dropout(.5), nn.Tanh()
ODD = [(lambda: Checkpointed(*dropped()), lambda: nn.Sequential(*dropped())),
       (lambda: Watched(6, 8), lambda: nn.Linear(6, 8))]

@pytest.mark.parametrize('f', [frob_reg, jac_reg])
@pytest.mark.parametrize('odd,usual', ODD, ids=['random numbers', 'item'])
def test_a_backward_pass_that_cannot_be_batched(odd, usual, f):
    def penalty(first):
        torch.manual_seed(0)
        net = nn.Sequential(first(), nn.Tanh(), nn.Linear(8, 3)).double()
        x = torch.randn(4, 6, dtype=F64, requires_grad=True)
        pen = f(net(x), x)
        return pen.detach(), *torch.autograd.grad(pen.sum(), [p for p in net.parameters() if p.ndim > 1])
    for ours, theirs in zip(penalty(odd), penalty(usual)): check(ours, theirs, 1e-12)

def test_other_errors_of_a_backward_pass_are_shown():
    net, x, *_ = make('mlp')
    y = net(x)
    def refuse(g): raise RuntimeError('no backward here')
    y.register_hook(refuse)
    with pytest.raises(RuntimeError, match='no backward here'): frob_reg(y, x)

def test_outputs_of_any_shape_have_a_projection():
    torch.manual_seed(0)
    net, x = nn.Conv2d(1, 2, 3).double(), torch.randn(3, 1, 5, 5, dtype=F64, requires_grad=True)
    y = net(x).tanh()
    v = gaussian(y)
    J = vmap(jacrev(lambda o: net(o[None])[0].tanh()))(x.detach())
    assert v.shape == (3, 2, 3, 3)
    assert_close(spect_reg(y, x, v), torch.einsum('ncijahw,ncij->nahw', J, v).square().sum((1, 2, 3)))


# probes

def test_spect_reg_draws_a_gaussian():
    net, x, *_ = make('mlp')
    logits = net(x)
    torch.manual_seed(3); mine = spect_reg(logits, x)
    torch.manual_seed(3); assert_close(mine, spect_reg(logits, x, gaussian(logits)), rtol=0, atol=0)
    assert not torch.equal(mine, spect_reg(logits, x))

@on_each_device
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize('shape', [(5, 3), (4, 1), (2, 3, 4)])
@pytest.mark.parametrize('probe', [gaussian, sphere, rademacher])
def test_probes(probe, shape, dtype, device):
    torch.manual_seed(0)
    # only shape, dtype and device count
    logits = torch.full(shape, float('nan'), dtype=dtype, device=device, requires_grad=True)
    v = probe(logits)
    assert (v.shape, v.dtype, v.device, v.requires_grad) == (logits.shape, dtype, logits.device, False)
    assert v.isfinite().all()
    assert v[0].numel() == 1 or not (v == v[0]).all()
    lengths = v.double().flatten(1).norm(dim=1)
    if probe is sphere: check(lengths, torch.ones_like(lengths), 4*torch.finfo(dtype).eps)
    if probe is rademacher: assert set(v.flatten().tolist()) <= {-1, 1}
    torch.manual_seed(0); assert torch.equal(v, probe(logits))
    torch.manual_seed(1); assert probe is not gaussian or not torch.equal(v, probe(logits))

MOMENT = {gaussian: lambda c: 1., sphere: lambda c: 1/c, rademacher: lambda c: 1.}
WRONG = {gaussian: lambda c: 1/c, sphere: lambda c: 1., rademacher: lambda c: 1/c}

@pytest.mark.parametrize('probe', [gaussian, sphere, rademacher])
def test_moments_of_the_probes(probe):
    "Mean zero, second moment a multiple of I: each entry within five standard errors, of the wrong one not"
    torch.manual_seed(0)
    n, c = 40_000, 6
    r = probe(torch.empty(n, c, dtype=F64))
    outer = r[:, :, None]*r[:, None]
    se = outer.std(0)/n**.5 + 1e-12
    eye = torch.eye(c, dtype=F64)
    assert ((outer.mean(0) - MOMENT[probe](c)*eye).abs() < 5*se).all()
    assert ((outer.mean(0) - WRONG[probe](c)*eye).abs() > 5*se).diagonal().all()
    assert (r.mean(0).abs() < 5*r.std(0)/n**.5).all()
    shifted = r[:-1]*r[1:]  # rows are independent
    assert (shifted.mean(0).abs() < 5*shifted.std(0)/n**.5).all()

@pytest.mark.parametrize('c', [2, 10])
@pytest.mark.parametrize('probe', [gaussian, sphere, rademacher])
def test_what_a_projection_estimates(probe, c):
    net, x, *_ = make('conv', c, 1)
    n = 10_000
    exact = frob_reg(net(x), x).item()
    many = x.detach().expand(n, -1, -1, -1).clone().requires_grad_()
    logits = net(many)
    est = spect_reg(logits, many, probe(logits)).detach()
    se = (est.std()/n**.5).item()
    assert abs(est.mean().item() - MOMENT[probe](c)*exact) < 4*se
    assert abs(est.mean().item() - WRONG[probe](c)*exact) > 4*se


@pytest.mark.parametrize('probe', [gaussian, sphere, rademacher])
@pytest.mark.parametrize('shape', [(4,), (4, 3), (2, 3, 4)])
def test_probes_of_a_generator(probe, shape):
    "One seed, one direction; the global generator stays where it is"
    logits, state = torch.empty(shape, dtype=F64), torch.get_rng_state()
    a, b = (probe(logits, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == shape
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(a, probe(logits))  # the same numbers as from the global one
    if probe is sphere and len(shape) == 1: assert_close(a.abs(), torch.ones(4, dtype=F64))

def test_spect_reg_of_a_generator():
    net, x, *_ = make('mlp')
    logits, g, state = net(x), torch.Generator(), torch.get_rng_state()
    got = spect_reg(logits, x, generator=g.manual_seed(3))
    assert torch.equal(got, spect_reg(logits, x, gaussian(logits, generator=g.manual_seed(3))))
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize('probe', [gaussian, sphere, rademacher])
def test_one_direction(probe):
    same = pickle.loads(pickle.dumps(one_direction(probe)))
    logits = torch.empty(5, 4, dtype=F64)
    v = same(logits, generator=torch.Generator().manual_seed(1))
    assert torch.equal(v, probe(logits[:1], generator=torch.Generator().manual_seed(1)).expand(5, 4))
    assert inspect.signature(same) == inspect.signature(probe)
    assert 'generator' not in inspect.signature(one_direction(lambda z: z)).parameters

def test_a_probe_that_returns_nothing():
    net, x, *_ = make('mlp')
    with pytest.raises(TypeError, match='the probe returned a NoneType'): one_direction(lambda z: None)(net(x))
    for v, name in (1., 'float'), ([1.], 'list'), (gaussian, 'function'):
        with pytest.raises(TypeError, match=f'v is a {name}, not a tensor: a probe must'): spect_reg(net(x), x, v)
    with pytest.raises(TypeError, match='v is a NoneType'): vjp(net(x), x, None)


# rows

@pytest.mark.parametrize('kind', NETS)
@pytest.mark.parametrize('c', [1, 5, 40, 70])
def test_rows_of_any_basis(kind, c):
    net, x, *_ = make(kind, c)
    Q = torch.linalg.qr(torch.randn(c, c, dtype=F64))[0]
    J = vmap(jacrev(lambda o: net(o[None])[0]))(x.detach()).flatten(2)
    assert_close(frob_reg(net(x), x, Q), J.square().sum((1, 2)))
    assert_close(frob_reg(net(x), x, lambda i, j: Q[i:j]), J.square().sum((1, 2)))
    half = Q[:max(1, c//2)]
    assert_close(frob_reg(net(x), x, half), (half @ J).square().sum((1, 2)))
    R = contrasts(net(x))
    assert R.shape == (max(1, c-1), c) and (c == 1 or R.sum(1).abs().max() < 1e-12)
    assert_close(R @ R.T, torch.eye(len(R), dtype=F64))
    assert torch.equal(torch.cat([contrasts(net(x), i, i+7) for i in range(0, c, 7)]), R)

@pytest.mark.parametrize('rows,error,match', [
    (torch.zeros(0, 3), ValueError, r'rows has shape \(0, 3\), but y has \(4, 3\): \(K,3\) with K at least 1'),
    (torch.zeros(3), ValueError, r'shape \(3,\)'), (torch.tensor(1.), ValueError, r'shape \(\)'),
    (torch.zeros(2, 4), ValueError, r'shape \(2, 4\)'), (lambda i, j: torch.zeros(0, 3), ValueError, r'shape \(0, 3\)'),
    ([[1., 0., 0.]], TypeError, 'rows is a list: pass a tensor'), (3, TypeError, 'rows is a int')])
@pytest.mark.parametrize('f', [frob_reg, jacobian])
def test_rows_that_are_no_rows(f, rows, error, match):
    net, x, *_ = make('mlp')
    with pytest.raises(error, match=match): f(net(x), x, rows)

class Largest(TorchDispatchMode):
    "Remembers the most bytes that one operation returned."
    bytes = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out

@pytest.mark.parametrize('f', [frob_reg, jac_reg])
def test_rows_have_bounded_memory(f):
    "No operation makes anything of the size of a matrix of all rows"
    c = 1500
    W, x = torch.randn(c, 4), torch.randn(2, 4, requires_grad=True)
    y = x @ W.T
    with torch.no_grad(), Largest() as seen: got = f(y, x)
    p = y.detach().softmax(1).double()[:, :, None]
    J = W.double() if f is frob_reg else p*(W.double() - (p*W.double()).sum(1, keepdim=True))
    check(got, J.square().sum((-2, -1)).expand(2), 1e-4)
    assert seen.bytes <= 32*2*c*4 < c*c*4/10

def test_as_many_rows_at_once_as_memory_allows():
    x = torch.randn(1000, 2, requires_grad=True)
    y = x @ torch.randn(2, 3000)
    with torch.no_grad():
        sizes = [J.shape[1] for J, _ in zip(jacobian_rows(y, x), range(2))]
    assert sizes == [5, 5]


# other norms, masked classes, one output

@each_net
@pytest.mark.parametrize('norm', [1, 2, math.inf])
def test_double_back_in_other_norms(norm, kind):
    net, x, y, _ = make(kind)
    losses = F.cross_entropy(net(x), y.argmax(1), reduction='none')
    pen = double_back(losses, x, norm)
    params = dict(net.named_parameters())
    def want(ps):
        loss = lambda o, t: F.cross_entropy(functional_call(net, ps, (o[None],))[0], t.argmax())
        g = vmap(grad(loss))(x.detach(), y).flatten(1)
        return {1: g.abs().sum(1), 2: g.square().sum(1).sqrt(), math.inf: g.abs().amax(1)}[norm]**2
    assert_close(pen, want(params))
    theirs = grad(lambda ps: (want(ps)*weighting(pen)).sum())({k: p.detach() for k, p in params.items()})
    ours = weight_grads(net, pen)
    for k, g in theirs.items(): check(ours[k], g, 1e-9)

@pytest.mark.parametrize('norm', [1, 2, math.inf])
def test_norms_at_zero_and_of_any_shape(norm):
    for shape in (4,), (4, 1), (4, 3, 2), (0, 3):
        t = torch.zeros(shape, dtype=F64, requires_grad=True)
        g, = torch.autograd.grad(sq_norm(t, norm).sum(), t, create_graph=True)
        assert g.isfinite().all() and sq_norm(t, norm).shape == shape[:1]

@pytest.mark.parametrize('norm', [0, 3, -1, 'fro', None, float('nan')])
def test_wrong_norm(norm):
    net, x, *_ = make('mlp')
    with pytest.raises(ValueError, match='choose 1, 2 or math.inf'): double_back(net(x).sum(1), x, norm)

MASKED = [*PENALTIES, 'confidence_penalty']
@pytest.mark.parametrize('name,mask', [*((o, 'fill') for o in MASKED),  # adding changes no logit's slope
                                       *((o, 'add') for o in MASKED if o not in ('frob_reg', 'spect_reg'))])
def test_masked_classes(name, mask):
    "A class with logits of minus infinity is no class: values and weight gradients are those of the rest"
    net, x, _, v = make('conv', 5)
    y, hidden = F.one_hot(torch.tensor([0, 2, 3, 0]), 5), torch.tensor([False, True, False, False, True])
    f = PENALTIES[name][0] if name in PENALTIES else lambda z, x, y, v: confidence_penalty(z)
    z = net(x)
    if mask == 'fill': masked = z.masked_fill(hidden, -math.inf)
    else: masked = z + torch.zeros(5, dtype=F64).masked_fill(hidden, -math.inf)
    got, want = f(masked, x, y, v), f(z[:, ~hidden], x, y[:, ~hidden], v[:, ~hidden])
    assert_close(got, want)
    ours, theirs = weight_grads(net, got), weight_grads(net, want)
    for k in ours: check(ours[k], theirs[k].detach(), 1e-9)

@pytest.mark.parametrize('name', ['frob_reg', 'jac_reg', 'spect_reg', 'jacobian'])
def test_one_number_is_a_row_of_one(name):
    net, x, *_ = make('mlp', 1)
    f = {'frob_reg': frob_reg, 'jac_reg': jac_reg, 'jacobian': jacobian,
         'spect_reg': lambda y, x: spect_reg(y, x, rademacher(y, generator=torch.Generator().manual_seed(0)))}[name]
    assert_close(f(net(x)[:, 0], x), f(net(x), x))
    assert_close(confidence_penalty(net(x)[:, 0]), torch.zeros(4, dtype=F64))


# what cannot be differentiated again

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x**2
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return 2*g*ctx.saved_tensors[0]

def attention(x): return F.scaled_dot_product_attention(x, x, x)
REFUSED = {'fused attention': (attention, '_scaled_dot_product_flash_attention_for_cpu_backward', 'SDPBackend.MATH'),
           'MultiheadAttention': (nn.MultiheadAttention(8, 2, batch_first=True), 'scaled_dot_product', 'eager'),
           'TransformerEncoder': (nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True),
                                  'scaled_dot_product', 'MATH'),
           'once': (lambda x: Square.apply(x), 'Square', 'another operation'),
           'compiled': (lambda x: torch.compile(torch.tanh, backend='aot_eager')(x), 'torch.compile',
                        'before torch.compile')}

@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('pen', ['spect_reg', 'frob_reg', 'double_back', 'vjp', 'jacobian', 'gram_product'])
@pytest.mark.parametrize('last', [True, False])
def test_no_second_derivative(name, pen, last):
    "The error comes when the penalty is made; where nothing is differentiated again, the value is right"
    torch.manual_seed(0)
    op, words, way = REFUSED[name]
    first, head = nn.Linear(8, 8), nn.Identity() if last else nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(2, 2, 5, 8, requires_grad=True) if 'fused' in name else torch.randn(2, 5, 8, requires_grad=True)
    def net(x):
        h = first(x)
        h = op(h, h, h, need_weights=False)[0] if isinstance(op, nn.MultiheadAttention) else op(h)
        return head(h).flatten(1)[:, :3]
    f = {'spect_reg': spect_reg, 'frob_reg': frob_reg, 'double_back': lambda z, x: double_back(z.logsumexp(1), x),
         'vjp': lambda z, x: vjp(z, x, torch.ones_like(z)), 'jacobian': jacobian,
         'gram_product': lambda z, x: gram_product(z, x)}[pen]
    with pytest.raises(NoSecondDerivative, match=re.escape(words)) as e: f(net(x), x)
    assert way in str(e.value) and isinstance(e.value, ValueError)
    if pen in ('frob_reg', 'jacobian', 'vjp'):
        with torch.no_grad(): got = f(_graph(net, x), x)
        assert got.isfinite().all()

def _graph(net, x):
    with torch.enable_grad(): return net(x)

def test_the_way_out_of_fused_attention():
    torch.manual_seed(0)
    enc = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=F64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH): z = enc(x).flatten(1)
    with sdpa_kernel(SDPBackend.MATH): J = vmap(jacrev(lambda o: enc(o[None])[0].flatten()))(x.detach())
    pen = frob_reg(z, x)
    assert_close(pen, J.flatten(1).square().sum(1))
    pen.sum().backward()

@pytest.mark.parametrize('where', ['before x', 'beside x', 'frozen'])
def test_what_is_not_in_the_way_is_not_refused(where):
    torch.manual_seed(0)
    w = nn.Linear(4, 4)
    if where == 'before x': x = Square.apply(w(torch.randn(3, 4))); y = w(x).tanh()
    if where == 'beside x':
        x = torch.randn(3, 4, requires_grad=True)
        y = w(x).tanh() + Square.apply(w(torch.randn(3, 4)))
    if where == 'frozen':
        x = torch.randn(3, 4, requires_grad=True)
        y = x*2
    spect_reg(y, x)

def test_an_error_that_names_the_layer():
    error = pickle.loads(pickle.dumps(NoSecondDerivative('_cudnn_rnn_backward', 'encoder.rnn')))
    assert (error.op, error.layer) == ('_cudnn_rnn_backward', 'encoder.rnn')
    assert '_cudnn_rnn_backward in encoder.rnn has' in str(error) and 'cudnn.flags(enabled=False)' in str(error)
    assert ' in ' not in str(NoSecondDerivative('op')).split(' has ')[0]


# compiled losses

@pytest.mark.parametrize('f', [frob_reg, jac_reg, spect_reg])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_penalty_in_a_compiled_loss(f):
    torch._dynamo.reset()
    net, x, *_ = make('mlp')
    r = {} if f is not spect_reg else dict(v=rademacher(net(x)).detach())
    def loss(x): return f(net(x), x, **r).sum()
    want = torch.autograd.grad(loss(x), list(net.parameters()), allow_unused=True)
    state = torch.get_rng_state()
    got = torch.compile(loss, backend='aot_eager', fullgraph=True)(x)
    assert_close(got.detach(), loss(x).detach())
    for ours, theirs in zip(torch.autograd.grad(got, list(net.parameters()), allow_unused=True), want):
        assert ours is theirs is None or torch.allclose(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)

@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_compiled_signs_are_new_at_each_call():
    torch._dynamo.reset()
    net, x = batch_net()
    f = torch.compile(lambda x: frob_reg(net(x), x), backend='aot_eager', fullgraph=True)
    assert not torch.equal(f(x), f(x))


# softmax, cross-entropy, norms

@pytest.mark.parametrize('dtype', [torch.float32, F64])
@pytest.mark.parametrize('c', [1, 2, 10])
def test_softmax_and_cross_entropy_jacobians(c, dtype):
    torch.manual_seed(0)
    z, y = torch.randn(5, c, dtype=dtype), torch.randint(c, (5,))
    p = z.softmax(1)
    check(softmax_jacobian(p), vmap(jacrev(lambda o: o.softmax(0)))(z.double()), 1e-6)
    for target in y, F.one_hot(y, c), F.one_hot(y, c).to(dtype), torch.rand(5, c, dtype=dtype):
        soft = F.one_hot(target, c) if target.ndim == 1 else target
        check(xent_jacobian(p, target), vmap(jacrev(lambda p, t: -(t*p.log()).sum()))(p.double(), soft.double()), 1e-6)

def test_cross_entropy_jacobian_at_underflown_probabilities():
    p = torch.tensor([[1., 0., 0.], [0., 1., 0.]])
    assert xent_jacobian(p, torch.tensor([0, 0])).tolist() == [[-1, 0, 0], [float('-inf'), 0, 0]]

@pytest.mark.parametrize('shape', [(4,), (4, 1), (4, 3), (4, 2, 3, 2), (0, 3)])
def test_sq_norm(shape):
    t = torch.randn(shape, dtype=F64)
    want = torch.tensor([sum(i*i for i in o.flatten().tolist()) for o in t], dtype=F64)
    assert_close(sq_norm(t), want)

@pytest.mark.parametrize('dtype', [torch.float32, F64])
@pytest.mark.parametrize('c', [1, 2, 10])
def test_confidence_penalty(c, dtype):
    torch.manual_seed(0)
    z = torch.randn(5, c, dtype=dtype, requires_grad=True)
    check(confidence_penalty(z), -torch.distributions.Categorical(logits=z.detach().double()).entropy(), 1e-5)
    saturated = (1e4*torch.eye(c, dtype=dtype)).requires_grad_()
    g, = torch.autograd.grad(confidence_penalty(saturated).sum(), saturated)
    assert_close(confidence_penalty(saturated).detach(), torch.zeros(c, dtype=dtype))
    assert g.isfinite().all()

"Networks: counts in closed form, layers re-implemented by hand, two derivatives, files, doors."
import copy, io, pickle
import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing import assert_close
from gradreg.models import cifar_resnet, cifar_resnet12, cifar_resnet_nobn, lenet5, mlp, resnet18, sin_mlp

SMALL = {'mlp': (lambda: mlp((12, 16, 16, 3)), (3, 2, 2)), 'lenet5': (lambda: lenet5(3), (1, 28, 28)),
         'dropout': (lambda: lenet5(3, p_drop=.5), (1, 28, 28)), 'bn': (lambda: lenet5(3, bn=True), (1, 28, 28)),
         'both': (lambda: lenet5(3, p_drop=.3, bn=True), (1, 28, 28)),
         'cifar_resnet': (lambda: cifar_resnet(3, width=4, n_blocks=2), (3, 12, 10)),
         'nobn': (lambda: cifar_resnet(3, width=4, n_blocks=2, norm=False), (3, 12, 10)),
         'resnet18': (lambda: resnet18(3), (3, 16, 16))}
small = pytest.mark.parametrize('name', SMALL)

def make(name, n=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net, d = SMALL[name]
    return net().to(dtype), torch.randn(n, *d).to(dtype)

def n_params(net): return sum(p.numel() for p in net.parameters())

# counts, in closed form
@pytest.mark.parametrize('sizes', [(1, 1), (4, 3), [7, 5, 2], (1, 64, 64, 64, 64, 64, 1)])
def test_mlp_count(sizes): assert n_params(mlp(sizes)) == sum((a+1)*b for a, b in zip(sizes, sizes[1:]))

@pytest.mark.parametrize('c', [1, 2, 10, 100])
def test_lenet_count(c):
    body = 6*(25+1) + 16*(6*25+1) + 120*(16*25+1) + 84*(120+1)
    assert n_params(lenet5(c)) == n_params(lenet5(c, p_drop=.5)) == body + c*85
    assert n_params(lenet5(c, bn=True)) == n_params(lenet5(c, .5, True)) == body + c*85 + 168

@pytest.mark.parametrize('c,w,b', [(10, 48, 3), (100, 48, 3), (10, 16, 1), (1, 1, 1), (7, 5, 4)])
def test_cifar_resnet_count(c, w, b):
    conv = lambda ni, nf: 9*ni*nf + 2*nf  # no bias; scale and shift of the normalization
    level = lambda ni, nf: conv(ni, nf) + (2*b-1)*conv(nf, nf)
    assert n_params(cifar_resnet(c, w, b)) == conv(3, w) + level(w, w) + level(w, 2*w) + level(2*w, 4*w) + c*(4*w+1)
    conv = lambda ni, nf: (9*ni + 1)*nf  # a bias and no normalization
    bare = conv(3, w) + level(w, w) + level(w, 2*w) + level(2*w, 4*w) + c*(4*w+1)
    assert n_params(cifar_resnet(c, w, b, norm=False)) == bare

def test_entries_are_the_networks_they_name():
    for entry, net in (cifar_resnet12(7), cifar_resnet(7, 12)), (cifar_resnet_nobn(7), cifar_resnet(7, norm=False)), \
                      (sin_mlp(), mlp((1, 64, 64, 64, 64, 64, 1))):
        assert [(k, p.shape) for k, p in entry.named_parameters()] == [(k, p.shape) for k, p in net.named_parameters()]
    assert n_params(cifar_resnet12(10)) == 152_182 and n_params(cifar_resnet_nobn(10)) == 2_410_666  # counted by hand

def test_resnet18_count():
    from torchvision.models import resnet18 as original
    for c in 1, 200: assert n_params(resnet18(c)) == n_params(original(num_classes=c)) - 64*3*49 + 64*3*9
    assert abs(n_params(resnet18()) - 11.3e6) < .05e6

# the same logits by hand
def test_mlp_by_hand():
    net, x = make('mlp')
    w = list(net.parameters())
    h = x.reshape(4, 12)
    for i in range(0, 4, 2): h = (h @ w[i].T + w[i+1]).clamp(min=0)
    assert_close(net(x), h @ w[4].T + w[5])

@pytest.mark.parametrize('bn', [False, True])
def test_lenet_by_hand(bn):
    torch.manual_seed(0)
    net, x = lenet5(10, bn=bn).eval(), torch.randn(5, 1, 28, 28)
    if bn:
        net[-2].running_mean.normal_(); net[-2].running_var.uniform_(.5, 2)
        nn.init.normal_(net[-2].weight); nn.init.normal_(net[-2].bias)
    c1, b1, c2, b2, c3, b3, w4, b4, *norm, w5, b5 = net.parameters()
    h = F.max_pool2d(F.conv2d(F.pad(x, (2, 2, 2, 2)), c1, b1).clamp(min=0), 2)
    h = F.max_pool2d(F.conv2d(h, c2, b2).clamp(min=0), 2)
    h = (h.reshape(5, 400) @ c3.reshape(120, 400).T + b3).clamp(min=0)  # a 5x5 convolution of a 5x5 map is a matrix
    h = (h @ w4.T + b4).clamp(min=0)
    if bn: h = (h - net[-2].running_mean)/(net[-2].running_var + net[-2].eps).sqrt()*norm[0] + norm[1]
    assert_close(net(x), h @ w5.T + b5)

def test_cifar_resnet_by_hand():
    torch.manual_seed(0)
    net, x = cifar_resnet(5, width=4, n_blocks=2).train(), torch.randn(6, 3, 8, 8)
    ps = iter(net.parameters())
    def conv(h, stride=1):
        h = F.conv2d(h, next(ps), None, stride, 1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
        return (h - mean)/(var + 1e-5).sqrt()*next(ps).view(-1, 1, 1) + next(ps).view(-1, 1, 1)
    h = conv(x).clamp(min=0)
    for nf, stride in (4, 1), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1):
        y = conv(conv(h, stride).clamp(min=0))
        if stride == 2: h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2])/4
        h = (y + torch.cat([h, torch.zeros(6, nf-h.shape[1], *h.shape[2:])], 1)).clamp(min=0)
    assert_close(net(x), h.mean((2, 3)) @ next(ps).T + next(ps), rtol=1e-4, atol=1e-5)
    assert next(ps, None) is None

def test_resnet18_is_torchvisions():
    from torchvision.models import resnet18 as original
    net, x = make('resnet18')
    twin = original(num_classes=3)
    twin.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    def theirs(k): return k.replace('conv1.1.', 'conv1.') if k.startswith('conv1.') else k
    twin.load_state_dict({theirs(k): v for k, v in net.state_dict().items()})
    assert_close(net.eval()(x), twin.eval()(x))

def test_dropout_is_where_table_2_has_it():
    torch.manual_seed(0)
    net, x = lenet5(10, p_drop=.25), torch.randn(200, 1, 28, 28)
    seen = {}
    net[-1].register_forward_pre_hook(lambda m, i: seen.update(last=i[0]))
    net[-3].register_forward_hook(lambda m, i, o: seen.update(relu=o))
    net(x)
    alive = seen['relu'] > 0
    kept = seen['last'][alive] != 0
    assert abs(kept.float().mean() - .75) < 4*(.75*.25/kept.numel())**.5
    assert_close(seen['last'][alive][kept], seen['relu'][alive][kept]/.75)
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) == 1
    assert not any(isinstance(m, (nn.Dropout, nn.BatchNorm1d)) for m in lenet5().modules())
    net.eval(); assert_close(net(x), net(x))
    net.train(); assert not torch.equal(net(x), net(x))

@small
def test_logits_not_probabilities(name):
    net, x = make(name, 8)
    net.eval(); y = net(30*x)
    assert y.shape == (8, 3) and ((y < 0) | (y > 1)).any()
    assert not torch.allclose(y.sum(1), torch.ones(8), atol=1e-3)

@small
def test_examples_are_independent_in_eval_mode(name):
    net, x = make(name, 5, torch.float64)
    net.eval(); assert_close(net(x), torch.cat([net(o[None]) for o in x]))

@small
def test_every_weight_learns(name):
    net, x = make(name, 8)
    F.cross_entropy(net(x), torch.arange(8) % 3).backward()
    for k, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, k

# two derivatives: the graph form against torch.func in float64
def graph_penalty(net, x, v):
    x = x.detach().clone().requires_grad_()
    g, = torch.autograd.grad(net(x), x, v, create_graph=True)
    return g.square().sum()

@pytest.mark.parametrize('name', [k for k in SMALL if k != 'resnet18'])  # its oracle is slow; its turn comes below
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_double_backward(name, dtype):
    net, x = make(name, 3, dtype)
    net.eval(); v = torch.randn(3, 3, dtype=dtype)
    ps = dict(net.named_parameters())
    ours = torch.autograd.grad(graph_penalty(net, x, v), list(ps.values()), allow_unused=True)
    oracle, args = copy.deepcopy(net).double(), (x.double(), v.double())
    bufs = dict(oracle.named_buffers())
    def pen(w):  # from the whole Jacobian, one example at a time
        J = vmap(jacrev(lambda o: functional_call(oracle, {**w, **bufs}, (o[None],))[0]))(args[0])
        return torch.einsum('nc...,nc->n...', J, args[1]).square().sum()
    theirs = grad(pen)({k: p.detach() for k, p in oracle.named_parameters()})
    for k, o in zip(ps, ours):
        o = torch.zeros_like(ps[k]) if o is None else o
        scale = theirs[k].abs().max().item()
        atol = (1e-3 if dtype == torch.float32 else 1e-9)*max(scale, 1e-12)
        assert_close(o.double(), theirs[k], rtol=1e-7, atol=atol, msg=lambda m: f'{k}: {m}')
    assert sum(o is not None and o.abs().sum().item() > 0 for o in ours) >= len(ours)//3

@pytest.mark.parametrize('name', ['dropout', 'bn', 'both', 'cifar_resnet', 'resnet18'])
def test_double_backward_in_train_mode(name):
    "By finite differences; a step small enough that no ReLU switches."
    net, x = make(name, 4, torch.float64)
    v, ps = torch.randn(4, 3, dtype=torch.float64), [p for p in net.parameters()]
    ds = [torch.randn_like(p)*.05 for p in ps]
    def pen(): torch.manual_seed(1); return graph_penalty(net.train(), x, v)
    def move(e):
        with torch.no_grad():
            for p, d in zip(ps, ds): p.add_(d, alpha=e)
    grads = torch.autograd.grad(pen(), ps, allow_unused=True)
    slope = sum((g*d).sum() for g, d in zip(grads, ds) if g is not None).item()
    e = 1e-8
    move(e); up = pen().item(); move(-2*e); down = pen().item()
    assert abs(slope) > 0 and abs((up-down)/(2*e*slope) - 1) < 1e-4

@pytest.mark.parametrize('name', [k for k in SMALL if k != 'mlp'])
def test_channels_last(name):
    net, x = make(name, 4, torch.float64)
    net.eval(); expected, first = net(x), graph_penalty(net, x, torch.ones(4, 3, dtype=torch.float64))
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_close(net(x), expected)
    assert_close(graph_penalty(net, x, torch.ones(4, 3, dtype=torch.float64)), first)

@small
def test_files_and_copies(name):
    net, x = make(name)
    net.eval(); expected = net(x)
    for twin in copy.deepcopy(net), pickle.loads(pickle.dumps(net)): assert_close(twin(x), expected, rtol=0, atol=0)
    f = io.BytesIO(); torch.save(net.state_dict(), f); f.seek(0)
    twin = make(name, seed=1)[0].eval()
    assert not torch.allclose(twin(x), expected)
    twin.load_state_dict(torch.load(f, weights_only=True))
    assert_close(twin(x), expected, rtol=0, atol=0)

@small
def test_seed_decides_the_weights(name):
    (a, _), (b, _), (c, _) = make(name), make(name), make(name, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()) if p.ndim > 1)

# doors
WRONG = {'mlp': [(4, 11), (4,), (4, 3, 2, 3), ()],
         'lenet5': [(4, 1, 32, 32), (4, 1, 28, 27), (4, 3, 28, 28), (1, 28, 28), (4, 784), (4, 1, 1, 28, 28)],
         'cifar_resnet': [(4, 1, 32, 32), (3, 32, 32), (4, 4, 32, 32), (4, 3072)],
         'resnet18': [(4, 1, 64, 64), (3, 64, 64), (4, 64, 64, 3)]}
@pytest.mark.parametrize('name,shape', [(k, s) for k, v in WRONG.items() for s in v])
def test_wrong_shape(name, shape):
    net = make(name)[0]
    with pytest.raises(ValueError, match=rf'^{name} takes inputs of shape \(N,.*, not \('): net(torch.randn(shape))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.bool])
@small
def test_not_a_float(name, dtype):
    net, x = make(name)
    with pytest.raises(ValueError, match=f'takes floats, not {dtype}'): net(x.to(dtype))

@pytest.mark.parametrize('f,arg', [
    (lambda: mlp((3,)), r'\(3,\)'), (lambda: mlp([]), r'\(\)'), (lambda: mlp((3, 0)), r'\(3, 0\)'),
    (lambda: mlp((3, -1, 2)), '-1'), (lambda: sin_mlp(0), '0'),
    (lambda: lenet5(0), 'n_out.*0'), (lambda: lenet5(p_drop=1.), 'p_drop.*1.0'), (lambda: lenet5(p_drop=-.1), '-0.1'),
    (lambda: lenet5(p_drop=float('nan')), 'p_drop.*nan'), (lambda: cifar_resnet(0), 'n_out'),
    (lambda: cifar_resnet(10, width=0), 'width'), (lambda: cifar_resnet12(0), 'n_out'),
    (lambda: cifar_resnet(10, n_blocks=0), 'n_blocks'), (lambda: resnet18(0), 'n_out')])
def test_wrong_arguments(f, arg):
    with pytest.raises(ValueError, match=arg): f()

@pytest.mark.parametrize('h,w', [(32, 32), (31, 33), (5, 2), (1, 1)])
def test_cifar_resnet_takes_any_size(h, w):
    assert cifar_resnet(2, 2, 1)(torch.randn(3, 3, h, w)).shape == (3, 2)

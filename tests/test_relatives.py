"The relatives against torch.func in float64, dense matrices and closed forms, over nets, shapes, dtypes; errors"
import copy, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from gradreg.jacobians import sq_norm
from gradreg.penalties import frob_reg, gaussian, sphere
from gradreg.relatives import (data_grad, finite_difference, jvp, layerwise, sobolev, spectral_norm_reg, stages,
                               start_vectors, steepest, tangent_prop, tangents, two_sided, weight_spectral_norms)
from nets import F64, NETS, Once, each_net

each_dtype = pytest.mark.parametrize('dtype,rtol', [(torch.float32, 2e-4), (F64, 1e-9)])

def make(kind, c=3, n=4, dtype=F64, seed=0):
    torch.manual_seed(seed)
    build, shape = NETS[kind]
    return build(c).to(dtype), torch.randn(n, *shape, dtype=dtype, requires_grad=True)

def jacobians(net):
    "The Jacobians (N,C,D) in float64 as a function of the parameters and the inputs."
    twin = copy.deepcopy(net).double()
    def of_one(o, params): return functional_call(twin, params, (o[None],))[0]
    return lambda params, x: vmap(jacrev(of_one), (0, None))(x.detach().double(), params).flatten(2)

def doubles(net): return {k: p.detach().double() for k, p in net.named_parameters()}
def witness(net, x): return jacobians(net)(doubles(net), x)

def grads_of(net, pen):
    g = torch.autograd.grad(pen.sum(), list(net.parameters()), allow_unused=True, retain_graph=True)
    return {k: torch.zeros_like(p) if o is None else o for (k, p), o in zip(net.named_parameters(), g)}

def agree(net, x, pen, f, rtol):
    "`pen` (N,) and its weight gradients are those of `f`, a function of the Jacobians (N,C,D)."
    ours, J, params = grads_of(net, pen), jacobians(net), doubles(net)
    assert pen.shape == x.shape[:1] and pen.dtype == x.dtype
    value = f(J(params, x))
    assert_close(pen.double(), value, rtol=rtol, atol=rtol*value.abs().max().item())
    theirs = grad(lambda p: f(J(p, x)).sum())(params)
    for k, g in theirs.items(): assert_close(ours[k].double(), g, rtol=5*rtol, atol=5*rtol*g.abs().max().item() + 1e-12)

# ---------------------------------------------------------------- TangentProp

@each_dtype
@pytest.mark.parametrize('c', [1, 3])
@pytest.mark.parametrize('t', [1, 3])
@each_net
def test_tangent_prop(kind, t, c, dtype, rtol):
    net, x = make(kind, c, dtype=dtype)
    T, v = torch.randn(len(x), t, *x.shape[1:], dtype=dtype), torch.randn(len(x), c, dtype=dtype)
    along = lambda J: torch.einsum('ncd,ntd->ntc', J, T.double().flatten(2))
    assert_close(jvp(net(x), x, T).double(), along(witness(net, x)), rtol=rtol, atol=rtol)
    agree(net, x, tangent_prop(net(x), x, T), lambda J: along(J).square().sum((1, 2)), rtol)
    projected = lambda J: torch.einsum('ntc,nc->nt', along(J), v.double()).square().sum(1)
    agree(net, x, tangent_prop(net(x), x, T, v), projected, rtol)

def test_tangents_of_another_shape_are_refused():
    net, x = make('mlp')
    for bad in torch.randn(4, 12, dtype=F64), torch.randn(4, 2, 11, dtype=F64), torch.randn(3, 2, 12, dtype=F64):
        with pytest.raises(ValueError, match=r'\(N,T,\*D\)'): tangent_prop(net(x), x, bad)

def test_tangents_are_linear_and_turn_with_the_image():
    a, b = torch.randn(2, 3, 1, 17, 17, dtype=F64)
    assert_close(tangents(2*a - 3*b), 2*tangents(a) - 3*tangents(b))
    right, down, clockwise, growing = tangents(a).unbind(1)
    turned = tangents(torch.rot90(a, 1, (2, 3)))  # a quarter turn against the clock: right becomes up
    expected = [torch.rot90(o, 1, (2, 3)) for o in (down, -right, clockwise, growing)]
    assert_close(turned, torch.stack(expected, 1))

def test_tangents_of_channels_are_those_of_each():
    a = torch.randn(2, 3, 9, 12)
    assert tangents(a).shape == (2, 4, 3, 9, 12)
    assert_close(tangents(a)[:, :, 1:2], tangents(a[:, 1:2]))

def test_what_stands_round_does_not_turn():
    b, a = torch.meshgrid(*[torch.arange(31, dtype=F64) - 15]*2, indexing='ij')
    disc = torch.exp(-(a**2 + b**2)/(2*4**2))[None, None]
    right, _, clockwise, growing = tangents(disc)[0]
    assert clockwise.norm() < .01*growing.norm() < right.norm()  # but for the pixels

@pytest.mark.parametrize('shape,blur', [((3, 8, 8), 1.), ((2, 1, 8, 8), 0.), ((2, 1, 8, 8), math.nan)])
def test_tangents_say_what_they_need(shape, blur):
    with pytest.raises(ValueError, match=r'\(N,ch,H,W\)'): tangents(torch.zeros(shape), blur)

# ---------------------------------------------------------------- DataGrad, finite differences

def loss_of(net, y): return lambda x: F.cross_entropy(net(x), y, reduction='none')

@pytest.mark.parametrize('norm', [1, 2, math.inf, 1.5])
@each_net
def test_finite_difference_of_a_linear_loss_is_exact(kind, norm):
    "A linear loss has no curvature: any step gives the norm."
    _, x = make(kind)
    w = torch.randn_like(x)
    def loss(x): return (w*x).flatten(1).sum(1)
    exact = torch.linalg.vector_norm(w.flatten(1), norm, dim=1)
    for h in .01, 3.:
        assert_close(data_grad(loss, x, h, norm), h*exact)
        assert_close(finite_difference(loss, x, h, norm), exact**2)

@each_net
def test_data_grad_finds_a_worse_neighbour_and_holds_the_direction(kind):
    net, x = make(kind)
    loss = loss_of(net, torch.tensor([0, 2, 1, 0]))
    assert (data_grad(loss, x, 1e-3) > 0).all()
    d = steepest(torch.autograd.grad(loss(x).sum(), x)[0])
    assert_close(grads_of(net, data_grad(loss, x, .1)), grads_of(net, loss(x.detach() + .1*d) - loss(x.detach())))

def test_first_order_only():
    "An operation without a second derivative does."
    x, w = torch.randn(5, 3, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)
    pen = finite_difference(lambda x: (w*Once.apply(x)).sum(1), x, 1e-5)
    assert_close(pen, (1 - x.tanh()**2).square().sum(1), rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(pen.sum(), w)[0].isfinite().all()

@pytest.mark.parametrize('f', [data_grad, finite_difference])
def test_differences_say_what_they_need(f):
    net, x = make('mlp')
    loss = loss_of(net, torch.tensor([0, 2, 1, 0]))
    for h in 0, -1., math.nan:
        with pytest.raises(ValueError, match='above 0'): f(loss, x, h)
    with pytest.raises(ValueError, match='norm=0.5'): f(loss, x, .1, .5)
    with pytest.raises(ValueError, match="reduction='none'"): f(lambda x: loss(x).mean(), x, .1)
    with pytest.raises(ValueError, match='requires_grad_'): f(loss, x.detach(), .1)

entry = st.floats(-1e6, 1e6).filter(lambda o: o == 0 or abs(o) > 1e-6)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(entry, min_size=4, max_size=4), min_size=1, max_size=3), st.sampled_from([1, 2, math.inf, 3]))
def test_no_direction_of_its_length_gains_more_than_the_steepest(rows, norm):
    g = torch.tensor(rows, dtype=F64)
    d, length = steepest(g, norm), torch.linalg.vector_norm(g, norm, dim=1)
    assert d.isfinite().all()
    assert_close((g*d).sum(1), length, rtol=1e-9, atol=1e-9)
    dual = {1: math.inf, 2: 2, math.inf: 1, 3: 1.5}[norm]
    other = torch.randn(len(g), 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    other = other/torch.linalg.vector_norm(other, dual, dim=1, keepdim=True)
    assert ((g*other).sum(1) <= length*(1 + 1e-9)).all()

# ---------------------------------------------------------------- layers

@each_net
@each_dtype
def test_layerwise_is_the_sum_over_layers(kind, dtype, rtol):
    net, x = make(kind, dtype=dtype)
    cut = {'mlp': (0, 2, 4, 5), 'conv': (0, 3, 6, 7)}[kind]
    pen, want, z = layerwise(net, x), 0, x.detach().double()
    for i, j in zip(cut, cut[1:]):
        part = copy.deepcopy(net[i:j]).double()
        want = want + vmap(jacrev(lambda o: part(o[None])[0].flatten()))(z).flatten(2).square().sum((1, 2))
        z = part(z).detach()
    assert pen.dtype == dtype and any(g.abs().sum() > 0 for g in grads_of(net, pen).values())
    assert_close(pen.double(), want, rtol=rtol, atol=0)

def test_one_layer_is_frob_reg():
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double(), torch.randn(6, 5, dtype=F64, requires_grad=True)
    assert_close(layerwise(net, x), frob_reg(net(x), x))

def test_a_probe_for_each_layer_is_unbiased():
    net, x = make('conv', n=2)
    est = torch.stack([layerwise(net, x, gaussian).detach() for _ in range(3000)])
    assert ((est.mean(0) - layerwise(net, x)).abs() < 4*est.std(0)/3000**.5).all()

def test_modules_without_weights_begin_no_layer():
    first = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(.5)
    net = nn.Sequential(nn.Flatten(), *first, nn.Linear(4, 2))
    assert [len(stage) for stage in stages(net)] == [5, 1]
    assert [m for stage in stages(net) for m in stage] == [*net]  # the very modules, in order
    assert [len(stage) for stage in stages(nn.Sequential(nn.ReLU(), nn.Tanh()))] == [2]

# ---------------------------------------------------------------- Sobolev

@each_net
@each_dtype
def test_sobolev(kind, dtype, rtol):
    net, x = make(kind, dtype=dtype)
    oracle, own = make(kind, dtype=dtype, seed=1)
    own = x.detach().clone().requires_grad_()
    target, v = witness(oracle, own), torch.randn(4, 3, dtype=dtype)
    pen = sobolev(net(x), x, oracle(own), own, v)
    assert all(g.abs().sum() == 0 for g in grads_of(oracle, pen).values())
    agree(net, x, pen, lambda J: torch.einsum('ncd,nc->nd', J - target, v.double()).square().sum(1), rtol)

# ---------------------------------------------------------------- spectral norms of weights

LAYERS = {'linear': (lambda: nn.Linear(6, 4), (6,)), 'linear of rows': (lambda: nn.Linear(6, 4), (3, 6)),
          'conv1d': (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 7)),
          'strided': (lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 7, 8)),
          'circular': (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode='circular'), (2, 5, 5)),
          'grouped': (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
          'dilated': (lambda: nn.Conv2d(1, 2, 3, dilation=2), (1, 7, 7)),
          'conv3d': (lambda: nn.Conv3d(1, 2, 2), (1, 3, 4, 3))}

@pytest.mark.parametrize('name', LAYERS)
def test_norm_of_a_layer_is_that_of_its_dense_matrix(name):
    torch.manual_seed(0)
    make_layer, shape = LAYERS[name]
    net = nn.Sequential(make_layer()).double()
    dense = jacrev(lambda o: net(o[None])[0].flatten())(torch.zeros(shape, dtype=F64)).flatten(1)
    vectors = start_vectors(net, torch.zeros(5, *shape, dtype=F64))
    for _ in range(2000): norm = weight_spectral_norms(net, vectors)['0']
    assert_close(norm.item(), torch.linalg.svdvals(dense)[0].item(), rtol=1e-5, atol=0)
    flat = start_vectors(net)
    for _ in range(2000): norm = weight_spectral_norms(net, flat)['0']
    want = torch.linalg.svdvals(net[0].weight.flatten(1))[0]
    assert_close(norm.item(), want.item(), rtol=1e-5, atol=0)
    assert_close(weight_spectral_norms(net)['0'], want)

@each_net
def test_power_steps_come_from_below_and_only_grow(kind):
    net, x = make(kind)
    exact, vectors, before = weight_spectral_norms(net), start_vectors(net), {}
    for _ in range(30):
        norms = weight_spectral_norms(net, vectors)
        for n, s in norms.items(): assert before.get(n, 0) <= s.item()*(1 + 1e-12) and s <= exact[n]*(1 + 1e-12)
        before = {n: s.item() for n, s in norms.items()}

@each_net
def test_operators_bound_the_jacobian_everywhere(kind):
    net, x = make(kind, n=50)
    vectors = start_vectors(net, x)
    for _ in range(500): norms = weight_spectral_norms(net, vectors)
    steepest_point = torch.linalg.svdvals(witness(net, 3*x))[:, 0].max()
    assert steepest_point <= math.prod(s.item() for s in norms.values())*(1 + 1e-6)

def test_starting_leaves_the_network_and_the_generators_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(.5), nn.Linear(4, 2))
    x, before = torch.randn(8, 4), copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    weight_spectral_norms(net, start_vectors(net, x))
    assert net.training and torch.equal(torch.get_rng_state(), state) and not net[0]._forward_pre_hooks
    for k, v in net.state_dict().items(): assert torch.equal(v, before[k])

def test_vectors_of_another_network_are_refused():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='call start_vectors'): weight_spectral_norms(net, {'1': torch.ones(1, 2)})

# ---------------------------------------------------------------- the spectral norm of the Jacobian

@pytest.mark.parametrize('c', [1, 2, 3, 12, 40])
@each_net
def test_spectral_norm_reg(kind, c):
    net, x = make(kind, c)
    pen = spectral_norm_reg(net(x), x, tol=0, max_iter=c)
    agree(net, x, pen, lambda J: torch.linalg.eigvalsh(J@J.mT)[:, -1], 1e-6)
    rough = spectral_norm_reg(net(x), x)
    assert ((rough <= pen*(1 + 1e-9)) & (rough >= .99*pen)).all()

def test_spectral_norm_reg_starts_where_it_is_told():
    net, x = make('mlp', 5)
    y, state = net(x), torch.get_rng_state()
    u = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spectral_norm_reg(y, x, u), spectral_norm_reg(y, x, u))
    assert torch.equal(torch.get_rng_state(), state)
    first = vmap(torch.dot)(u, u)[:, None]**-.5*u
    by_hand = sq_norm(torch.einsum('ncd,nc->nd', witness(net, x), first))
    assert_close(spectral_norm_reg(y, x, u, max_iter=1), by_hand)

# ---------------------------------------------------------------- two-sided

@pytest.mark.parametrize('target', [0., 1., 3.])
@each_net
@each_dtype
def test_two_sided(kind, target, dtype, rtol):
    net, x = make(kind, 1, dtype=dtype)
    agree(net, x, two_sided(net(x), x, target), lambda J: (J[:, 0].square().sum(1).sqrt() - target)**2, rtol)

def test_no_nan_where_the_gradient_is_zero():
    w = torch.ones(3, requires_grad=True)
    x = torch.zeros(2, 3, requires_grad=True)
    pen = two_sided((w*x**3).sum(1), x)
    assert_close(pen, torch.ones(2))
    assert torch.equal(torch.autograd.grad(pen.sum(), w)[0], torch.zeros(3))

def test_two_sided_takes_one_output():
    net, x = make('mlp', 2)
    with pytest.raises(ValueError, match='one output per example'): two_sided(net(x), x)

# ---------------------------------------------------------------- all of them

def test_spherical_spect_reg_is_the_best_known_library():
    "Hoffman, Roberts and Yaida's value, word for word: C*norm(J^T v)**2/N/2 of a batch."
    net, x = make('conv')
    v = sphere(net(x))
    g, = torch.autograd.grad(net(x), x, v, create_graph=True)
    assert_close(sq_norm(torch.einsum('ncd,nc->nd', witness(net, x), v)).mean()*3/2, 3*torch.norm(g)**2/4/2)

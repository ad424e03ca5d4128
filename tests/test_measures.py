"Measures: oracles, hard spectra, what must be left as it was, odd inputs."
import gc, warnings, weakref
import pytest, torch
from torch import nn
from torch.func import jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from gradreg.jacobians import lanczos
from gradreg.measures import (accuracy, between, jac_norms, loss_grad_norms, noise_like, sampled_jac_norms,
                              spectral_norms)
from gradreg.models import cifar_resnet, lenet5, mlp
from nets import F64, Once

def linear(c, d=12): return nn.Linear(d, c)
def tanh_net(c): return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, c))
def inplace_net(c): return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, c))
def bn_net(c):
    return nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(.5),
                         nn.Flatten(), nn.Linear(5, c))
def small_mlp(c): return mlp((12, 8, c))
NETS = {'tanh': (tanh_net, (3, 2, 2)), 'linear': (linear, (12,)), 'flat mlp': (small_mlp, (12,)),
        'mlp of images': (small_mlp, (3, 2, 2)), 'sequence': (tanh_net, (4, 3)),
        'one number': (lambda c: mlp((1, 8, c)), (1,)), 'bn+dropout': (bn_net, (3, 2, 2)),
        'in place': (inplace_net, (3, 2, 2)), 'lenet5': (lambda c: lenet5(c, p_drop=.5, bn=True), (1, 28, 28)),
        'resnet': (lambda c: cifar_resnet(c, 3, 1), (3, 6, 6))}

def make(name, c, n=5, dtype=F64):
    torch.manual_seed(0)
    net, d = NETS[name]
    net = net(c).to(dtype)
    for m in net.modules():  # statistics that matter
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    return net, torch.randn(n, *d, dtype=dtype)

def oracle(net, x):
    "(N,C,D) by torch.func, in eval mode."
    modes = [m.training for m in net.modules()]
    net.eval()
    J = vmap(jacrev(lambda o: net(o[None].clone())[0]))(x).detach().flatten(1)
    J = J.view(len(x), net(x.clone()).shape[1], -1)
    for m, t in zip(net.modules(), modes): m.training = t
    return J

def zero_labels(m, x, **k): return loss_grad_norms(m, x, torch.zeros(len(x), dtype=torch.long), **k)
MEASURES = {'jac_norms': jac_norms, 'spectral_norms': spectral_norms, 'loss_grad_norms': zero_labels}
every = pytest.mark.parametrize('measure', MEASURES.values(), ids=MEASURES)

# values
@pytest.mark.parametrize('c', [1, 3, 40])
@pytest.mark.parametrize('name', NETS)
def test_norms_against_jacrev(name, c):
    net, x = make(name, c)
    s = torch.linalg.svdvals(oracle(net, x))
    frob, spec = jac_norms(net, x, bs=2), spectral_norms(net, x, bs=2)
    assert frob.shape == spec.shape == (5,) and frob.dtype == spec.dtype == F64
    assert_close(frob, s.square().sum(1).sqrt())
    assert_close(spec, s[:, 0], rtol=1e-9 if c <= 32 else 1e-5, atol=1e-12)
    assert (spec <= frob*(1+1e-9)).all() and (frob <= min(c, x[0].numel())**.5*spec*(1+1e-5)).all()

@pytest.mark.parametrize('name', NETS)
def test_float32(name):
    for c in 3, 40:
        net, x = make(name, c, dtype=torch.float32)
        s = torch.linalg.svdvals(oracle(net.double(), x.double()))
        net.float()
        assert_close(jac_norms(net, x).double(), s.square().sum(1).sqrt(), rtol=1e-4, atol=1e-6)
        assert_close(spectral_norms(net, x).double(), s[:, 0], rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('c', [1, 2, 32, 33, 64, 200])
@pytest.mark.parametrize('dtype,rtol', [(F64, 1e-5), (torch.float32, 3e-5)])
def test_spectral_norm_of_random_matrices(c, dtype, rtol):
    for d in 1, 7, 300:
        torch.manual_seed(c+d)
        net = linear(c, d).to(dtype)
        truth = torch.linalg.svdvals(net.weight.detach().double())[0].expand(3)
        assert_close(spectral_norms(net, torch.randn(3, d, dtype=dtype)).double(), truth, rtol=rtol, atol=0)

def spectrum(s, n, dtype):
    torch.manual_seed(0)
    s = torch.as_tensor(s, dtype=F64)
    Q = lambda: torch.linalg.qr(torch.randn(n, len(s), len(s), dtype=F64))[0]
    return (Q()*s @ Q().mT).to(dtype)

SPECTRA = {'all equal': [1.]*50, 'two equal': [3., 3.] + [1.]*48, 'ten equal': [2.]*10 + [1.999]*40,
           'nearly equal': [1., 1-1e-6] + [.5]*48, 'clustered top': [1 - 1e-4*i for i in range(50)],
           'rank one': [7.] + [0.]*49, 'rank two': [7., 6.999] + [0.]*48, 'zero': [0.]*50,
           'geometric': [.7**i for i in range(50)], 'slow': [.98**i for i in range(50)],
           'single': [4.], 'pair': [4., 4.]}
CLOSE = 'ten equal', 'clustered top', 'rank two'  # the next value lies within tol
@pytest.mark.parametrize('dtype', [F64, torch.float32])
@pytest.mark.parametrize('scale', [1., 1e-8, 1e6])
@pytest.mark.parametrize('name', SPECTRA)
def test_lanczos_on_hard_spectra(name, scale, dtype):
    A = scale*spectrum(SPECTRA[name], 8, dtype)
    B = A @ A.mT
    u = torch.randn(B.shape[1], dtype=dtype).expand(8, -1)
    value, direction, rough = lanczos(lambda u: torch.einsum('nij,nj->ni', B, u), u)
    ours = value.sqrt()
    truth = torch.full((8,), scale*SPECTRA[name][0], dtype=F64)
    assert not rough.any() and ours.isfinite().all()
    assert_close(ours.double(), truth, rtol=5e-4, atol=0)                                # what tol promises: half of it
    if name not in CLOSE: assert_close(ours.double(), truth, rtol=2e-5, atol=0)
    assert (ours.double() <= truth*(1 + 1e-5)).all()                                     # from below

@pytest.mark.parametrize('c', [50, 120])
def test_lanczos_is_exact_after_c_products(c):
    torch.manual_seed(0)
    A = torch.randn(6, c, 2*c, dtype=F64)
    start = torch.randn(c, dtype=F64).expand(6, c)
    value, direction, rough = lanczos(lambda u: torch.einsum('nij,nkj,nk->ni', A, A, u), start, 0., 10*c)
    assert not rough.any()
    U, s, _ = torch.linalg.svd(A)
    assert_close(value.sqrt(), s[:, 0], rtol=1e-12, atol=0)
    assert_close((direction*U[:, :, 0]).sum(1).abs(), torch.ones(6, dtype=F64), rtol=1e-9, atol=0)  # either sign

def test_lanczos_grows_towards_the_truth():
    torch.manual_seed(0)
    A = torch.randn(4, 60, 70, dtype=F64)
    def after(k): return lanczos(lambda u: torch.einsum('nij,nkj,nk->ni', A, A, u), torch.ones(4, 60, dtype=F64), 0., k)
    est = torch.stack([after(k)[0].sqrt() for k in range(1, 20)])
    assert (est.diff(dim=0) >= -1e-12).all() and (est <= torch.linalg.svdvals(A)[:, 0]*(1+1e-12)).all()

def test_warns_only_if_not_converged():
    net, x = make('lenet5', 100)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        spectral_norms(net, x)
        spectral_norms(make('lenet5', 10)[0], x, tol=0, max_iter=1)  # exact: no steps are taken
    with pytest.warns(UserWarning, match='max_iter=2.*5 of 5.*lower bounds'): spectral_norms(net, x, max_iter=2)

@pytest.mark.parametrize('c', [4, 50])
def test_zero_and_diverged(c):
    net, x = make('tanh', c)
    nn.init.zeros_(net[-1].weight)
    for measure in jac_norms, spectral_norms: assert_close(measure(net, x), torch.zeros(5, dtype=F64))
    for bad in float('nan'), float('inf'):
        net, x = make('flat mlp', c)
        x[1] = bad
        good = torch.tensor([0, 2, 3, 4])  # a bad example spoils no other
        assert_close(jac_norms(net, x)[good], jac_norms(net, x[good]))
        assert_close(spectral_norms(net, x)[good], spectral_norms(net, x[good]), rtol=1e-5, atol=0)
    nn.init.constant_(net[-1].weight, float('nan'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert jac_norms(net, x).isnan().all() and spectral_norms(net, x).isnan().all()

@pytest.mark.parametrize('name', NETS)
def test_loss_gradients_one_at_a_time(name):
    net, x = make(name, 4)
    y = torch.arange(5) % 4
    got = loss_grad_norms(net, x, y, bs=3)
    net.eval()
    for o, t, g in zip(x, y, got):
        o = o[None].clone().requires_grad_()
        F.cross_entropy(net(o.clone()), t[None]).backward()
        assert_close(o.grad.norm(), g)

def test_other_losses():
    net, x = make('tanh', 4)
    soft = torch.rand(5, 4, dtype=F64).softmax(1)
    J, p = oracle(net, x), net(x).softmax(1).detach()
    assert_close(loss_grad_norms(net, x, soft), torch.einsum('ncd,nc->nd', J, p - soft).norm(dim=1))
    t = torch.randn(5, 4, dtype=F64)
    want = torch.einsum('ncd,nc->nd', J, 2*(net(x)-t).detach()).norm(dim=1)
    assert_close(loss_grad_norms(net, x, t, lambda z, y: (z-y).square().sum(1)), want)
    for loss in F.cross_entropy, lambda z, y: F.mse_loss(z, z.detach()+1, reduction='none'), lambda z, y: z[:, :1]:
        with pytest.raises(ValueError, match='one number each'):
            loss_grad_norms(net, x, torch.zeros(5, dtype=torch.long), loss)

def test_accuracy():
    class Same(nn.Module):
        def forward(self, x): return x
    torch.manual_seed(0)
    z, y = torch.randn(333, 7), torch.randint(7, (333,))
    right = sum(max(range(7), key=lambda c: row[c]) == t for row, t in zip(z.tolist(), y.tolist()))
    for bs in 1, 100, 333, 1000: assert accuracy(Same(), z, y, bs=bs) == pytest.approx(right/333, abs=1e-12)
    assert isinstance(accuracy(Same(), z, y), float)
    assert accuracy(Same(), z, z.argmax(1)) == 1 and accuracy(Same(), z, z.argmin(1)) == 0
    for bad in y[:, None], y.float(), F.one_hot(y):
        with pytest.raises(ValueError, match='class indices'): accuracy(Same(), z, bad)
    with pytest.raises(ValueError, match='two or more logits'): accuracy(Same(), z[:, :1], y)

# chunks
@every
@pytest.mark.parametrize('name', ['bn+dropout', 'lenet5', 'tanh'])
def test_chunks_change_nothing(measure, name):
    for c in 3, 40:
        net, x = make(name, c, n=11)
        ref = measure(net, x, bs=11)
        for bs in 1, 2, 10, 12, 10_000: assert_close(measure(net, x, bs=bs), ref, rtol=1e-5 if c > 32 else 1e-9, atol=0)
        assert_close(measure(net, x.flip(0)), ref.flip(0), rtol=1e-5 if c > 32 else 1e-9, atol=0)

@every
def test_never_more_than_bs_at_once(measure):
    for c in 3, 40:
        net, x = make('tanh', c, n=11)
        seen = []
        net.register_forward_pre_hook(lambda m, i: seen.append(len(i[0])))
        measure(net, x, bs=4)
        assert seen == [4, 4, 3]

# what must be left as it was
@every
@pytest.mark.parametrize('c', [3, 40])
def test_leaves_no_trace(measure, c):
    net, x = make('lenet5', c)
    net.train(); net[1].eval(); net[1].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    copy, rng, grad_mode = x.clone(), torch.get_rng_state(), torch.is_grad_enabled()
    out = measure(net, x)
    assert modes == [m.training for m in net.modules()] and True in modes and False in modes
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(x, copy) and not x.requires_grad and x.grad is None
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled() == grad_mode
    assert not out.requires_grad and out.grad_fn is None

@every
def test_modes_come_back_after_an_error(measure):
    net, x = make('bn+dropout', 3)
    net.train(); net[1].eval()
    net.append(nn.Identity())
    net[-1].register_forward_hook(lambda m, i, o: 1/0)
    modes = [m.training for m in net.modules()]
    with pytest.raises(ZeroDivisionError): measure(net, x)
    assert modes == [m.training for m in net.modules()] and torch.is_grad_enabled()

@every
@pytest.mark.parametrize('c', [3, 40])
def test_no_graph_outlives_the_call(measure, c):
    net, x = make('tanh', c)
    alive = []
    net[1].register_forward_hook(lambda m, i, o: alive.append(weakref.ref(o)))
    out = measure(net, x, bs=2)
    gc.collect()
    assert len(alive) == 3 and all(r() is None for r in alive) and len(out) == 5

@every
@pytest.mark.parametrize('c', [3, 40])
def test_under_other_grad_modes(measure, c):
    net, x = make('lenet5', c)
    ref = measure(net, x)
    with torch.no_grad(): assert_close(measure(net, x), ref); assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inner = x.clone()
        for o in x, inner: assert_close(measure(net, o), ref)
        assert torch.is_inference_mode_enabled()
    assert_close(measure(net, inner), ref)  # an inference tensor outside
    for p in net.parameters(): p.requires_grad_(False)
    assert_close(measure(net, x), ref)

@every
def test_autocast_outside_is_ignored(measure):
    for c in 3, 40:
        net, x = make('lenet5', c, dtype=torch.float32)
        ref = measure(net, x)
        with torch.autocast('cpu', dtype=torch.bfloat16): assert_close(measure(net, x), ref)

@every
def test_inputs_of_all_kinds(measure):
    net, x = make('lenet5', 3)
    ref = measure(net, x)
    leaf = x.clone().requires_grad_()
    for o in (leaf, leaf*1, x.to(memory_format=torch.channels_last), x.flip(0).flip(0),
              x.repeat_interleave(2, 0)[::2]): assert_close(measure(net, o), ref)
    assert leaf.grad is None
    assert_close(measure(net.to(memory_format=torch.channels_last), x), ref)

@every
def test_train_mode_does_not_leak_in(measure):
    net, x = make('bn+dropout', 3)
    assert_close(measure(net.train(), x), measure(net.eval(), x), rtol=0, atol=0)
    assert_close(measure(net.train(), x), torch.cat([measure(net, o[None]) for o in x]))

def test_one_dimensional_inputs():
    class Poly(nn.Module):
        def forward(self, x): return torch.stack([x, x**2, x**3], 1)
    x = torch.tensor([0., 1., -2.], dtype=F64)
    J = torch.stack([torch.ones(3, dtype=F64), 2*x, 3*x**2], 1)
    assert_close(jac_norms(Poly(), x), J.norm(dim=1)); assert_close(spectral_norms(Poly(), x), J.norm(dim=1))

@every
def test_learner_and_fastai_tensors(measure):
    pytest.importorskip('fastai')
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.torch_core import TensorImage
    net, x = make('lenet5', 3)
    learn = Learner(DataLoaders([], []), net.train(), loss_func=nn.CrossEntropyLoss())
    out = measure(learn, x.as_subclass(TensorImage))
    assert type(out) is torch.Tensor and learn.model.training
    assert_close(out, measure(net, x))

def test_the_networks_own_child_called_model():
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.model = linear(3).double()
        def forward(self, x): return 10*self.model(x)
    net, x = Wrapped(), torch.randn(2, 12, dtype=F64)
    assert_close(jac_norms(net, x), 10*jac_norms(net.model, x))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@every
def test_devices(measure):
    for c in 3, 40:
        net, x = make('lenet5', c)
        ref = measure(net, x)
        net.cuda()
        assert_close(measure(net, x), ref, rtol=1e-4, atol=1e-6)
        assert_close(measure(net, x.cuda()), ref.cuda(), rtol=1e-4, atol=1e-6)

# functions, DataLoaders, half precision, what has no second derivative
@every
@pytest.mark.parametrize('c', [3, 40])
def test_any_function(measure, c):
    net, x = make('lenet5', c)
    ref = measure(net, x)
    modes = [m.training for m in net.train().modules()]
    assert_close(measure(net.forward, x), ref)                    # a method: its module goes into eval mode
    assert modes == [m.training for m in net.modules()]
    net.eval()
    for f in lambda x: net(x), lambda x: {'logits': net(x)}['logits']: assert_close(measure(f, x), ref)
    with pytest.raises(ValueError, match='returned a dict, .*lambda x: model'): measure(lambda x: {'logits': net(x)}, x)

def test_a_function_of_the_inputs_alone():
    x = torch.randn(5, 3, dtype=F64)
    assert_close(jac_norms(torch.sin, x), x.cos().norm(dim=1))
    assert_close(spectral_norms(torch.sin, x), x.cos().abs().amax(1))
    assert_close(jac_norms(lambda x: x.prod(1), x), (x.prod(1, keepdim=True)/x).norm(dim=1))  # (N,) counts as (N,1)

@every
def test_dataloaders(measure):
    from fastai.data.core import DataLoader as FastaiLoader, DataLoaders
    net, x = make('lenet5', 3, n=7)
    ref = measure(net, x)
    y = torch.zeros(7, dtype=torch.long)
    f = loss_grad_norms if measure is MEASURES['loss_grad_norms'] else measure
    pairs = TensorDataset(x, y)
    for dl in DataLoader(pairs, batch_size=3), FastaiLoader(pairs, bs=3), DataLoader(pairs, batch_size=7):
        rng = torch.get_rng_state()
        assert_close(f(net, dl, bs=2), ref)
        assert torch.equal(torch.get_rng_state(), rng)
    both = DataLoaders(DataLoader(pairs), DataLoader(pairs))
    with pytest.raises(TypeError, match='is a DataLoaders: pass a tensor or one DataLoader'): f(net, both)
    with pytest.raises(ValueError, match='empty'): f(net, DataLoader([]))

def test_dataloaders_with_and_without_targets():
    net, x = make('lenet5', 3, n=7)
    y = torch.arange(7) % 3
    assert accuracy(net, DataLoader(TensorDataset(x, y), batch_size=2)) == accuracy(net, x, y)
    for dl in DataLoader(TensorDataset(x), batch_size=2), DataLoader(x, batch_size=2):
        assert_close(jac_norms(net, dl), jac_norms(net, x))
        with pytest.raises(ValueError, match='1 tensors a batch, not inputs and targets'): accuracy(net, dl)
    with pytest.raises(TypeError, match='y is a NoneType'): accuracy(net, x)

@every
@pytest.mark.parametrize('c', [3, 40])
@pytest.mark.parametrize('dtype,rtol', [(torch.bfloat16, .05), (torch.float16, .01)])
def test_half_precision(measure, c, dtype, rtol):
    "Inputs of any precision, results in float32, as near to the same weights in float64 as the precision allows"
    net, x = make('tanh', c)
    net, x = net.to(dtype), x.to(dtype)
    twin, _ = make('tanh', c)
    twin.load_state_dict(net.state_dict())
    for inputs in x, x.float(), x.double():
        got = measure(net, inputs)
        assert got.dtype == torch.float32
        assert_close(got.double(), measure(twin, x.double()), rtol=rtol, atol=1e-3)

@every
@pytest.mark.parametrize('c', [3, 40])
def test_inputs_in_another_precision(measure, c):
    net, x = make('tanh', c)
    assert measure(net, x.float()).dtype == F64 and measure(net.float(), x).dtype == torch.float32

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, c)
    def forward(self, x): return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

@every
@pytest.mark.parametrize('c', [3, 40])
def test_what_has_no_second_derivative(measure, c):
    torch.manual_seed(0)
    x, net = torch.randn(5, 6, 4, dtype=F64), Attention(c).double()
    got = measure(net, x)
    with sdpa_kernel(SDPBackend.MATH): assert_close(got, measure(net, x), rtol=1e-5, atol=0)
    s = torch.linalg.svdvals(oracle(net, x))
    if measure is spectral_norms: assert_close(got, s[:, 0], rtol=1e-5, atol=0)
    if measure is jac_norms: assert_close(got, s.norm(dim=1))
    plain, x = make('tanh', c)
    assert_close(measure(lambda x: plain[3](Once.apply(plain[:2](x))), x), measure(plain, x), rtol=1e-5, atol=0)

@pytest.mark.parametrize('name,c', [('tanh', 3), ('tanh', 200), ('linear', 1)])
def test_sampled_norms(name, c):
    "Right within their standard errors, which are right themselves; at 4 times as many directions half as large"
    net, x = make(name, c)
    x = x.repeat(40, *[1]*(x.ndim - 1))
    exact, state = jac_norms(net, x), torch.get_rng_state()
    errors = []
    for n in 8, 32:
        norms, se = sampled_jac_norms(net, x, n=n, bs=64)
        assert norms.shape == se.shape == (200,)
        off = (norms - exact)/se.clamp(min=1e-9)
        assert c == 1 or .85 < off.square().mean().sqrt() < (1.6 if n == 8 else 1.25)  # Student's t of 7 is 1.18
        assert abs(off.mean()) < 4/200**.5 + .15  # the root of an unbiased estimate is a little low
        errors.append(se.mean().item())
    assert c == 1 and max(errors) < 1e-9 or 1.8 < errors[0]/errors[1] < 2.2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(norms, sampled_jac_norms(net, x, n=32, bs=64)[0])
    assert c == 1 or not torch.equal(norms, sampled_jac_norms(net, x, n=32, bs=64, seed=1)[0])

def test_sampled_norms_of_maps():
    torch.manual_seed(0)
    net, x = nn.Conv2d(1, 2, 3).double(), torch.randn(2, 1, 5, 5, dtype=F64)
    exact = vmap(jacrev(lambda o: net(o[None])[0]))(x).flatten(1).norm(dim=1)
    norms, se = sampled_jac_norms(net, x, n=200)
    assert ((norms - exact).abs() < 4*se).all() and (se < .06*exact).all()
    with pytest.raises(ValueError, match='sampled_jac_norms takes outputs of any shape'): jac_norms(net, x)
    with pytest.raises(ValueError, match='at least 2, not 1'): sampled_jac_norms(net, x, n=1)

@every
def test_examples_that_depend_on_each_other_are_measured_alike_each_time(measure):
    class Normed(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Linear(12, 3).double()
        def forward(self, x): return self.net((x - x.mean(0))/x.std(0)).tanh()
    torch.manual_seed(0)
    net, x = Normed(), torch.randn(6, 12, dtype=F64)
    assert torch.equal(measure(net, x), measure(net, x))

# refusals
@every
@pytest.mark.parametrize('x,error,match', [
    (torch.zeros(0, 12), ValueError, 'no example'), (torch.zeros(()), ValueError, 'no example'),
    *((torch.zeros(2, 12, dtype=t), ValueError, str(t)) for t in (torch.int64, torch.uint8, torch.bool))])
def test_bad_inputs(measure, x, error, match):
    if not x.ndim and measure is MEASURES['loss_grad_norms']: x = torch.zeros(0, 12)
    with pytest.raises(error, match=match): measure(linear(3), x)

@every
def test_bad_models_and_sizes(measure):
    net, x = linear(3), torch.randn(4, 12)
    for bs in 0, -1:
        with pytest.raises(ValueError, match=f'bs.*{bs}'): measure(net, x, bs=bs)
    for model in 'net', None, 3:
        with pytest.raises(TypeError, match='pass an nn.Module, a Learner, or a function'): measure(model, x)
    dense = nn.Sequential(net, nn.Unflatten(1, (3, 1)))
    with pytest.raises(ValueError, match=r'\(4, 3, 1\).*needs logits'): measure(dense, x)
    class Pair(nn.Module):
        def forward(self, x): return x, x
    with pytest.raises(ValueError, match='tuple.*needs logits'): measure(Pair(), x)
    with pytest.raises(TypeError, match='is a list'): jac_norms(net, x.tolist())

def test_lengths_must_agree():
    for f in loss_grad_norms, accuracy:
        with pytest.raises(TypeError, match='y is a list'): f(linear(3), torch.randn(2, 12), [0, 1])
        with pytest.raises(ValueError, match=r'4 examples, but y has shape \(3,\)'):
            f(linear(3), torch.randn(4, 12), torch.zeros(3, dtype=torch.long))

@pytest.mark.parametrize('kw', [{'tol': -1e-3}, {'tol': float('nan')}, {'max_iter': 0}])
def test_bad_stopping_rule(kw):
    with pytest.raises(ValueError, match='tol must be at least 0'): spectral_norms(linear(3), torch.randn(4, 12), **kw)

# points
@pytest.mark.parametrize('f', [between, noise_like])
@pytest.mark.parametrize('shape', [(6,), (6, 1), (6, 5), (6, 3, 4), (6, 3, 4, 2)])
def test_points_shape_seed_and_no_side_effects(f, shape):
    for dtype in torch.float32, F64:
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        rng = torch.get_rng_state()
        a, b, c = f(x, 9), f(x, 9, seed=0), f(x, 9, seed=1)
        assert torch.equal(torch.get_rng_state(), rng)
        assert a.shape == (9, *shape[1:]) and a.dtype == dtype and not a.requires_grad
        assert torch.equal(a, b) and not torch.equal(a, c)

def test_between_is_on_segments():
    torch.manual_seed(0)
    x = torch.randn(4, 30, dtype=F64)  # in general position: the coordinates are unique
    p = between(x, 500)
    coef = torch.linalg.lstsq(x.T, p.T).solution.T
    assert_close(coef @ x, p)
    ends = coef.abs() > 1e-9
    assert (ends.sum(1) == 2).all() and (coef > -1e-9).all()          # two different points, and between them
    assert_close(coef.sum(1), torch.ones(500, dtype=F64))
    pairs = {tuple(e.nonzero().flatten().tolist()) for e in ends}
    assert len(pairs) == 6                                            # every pair occurs
    t = coef.max(1).values
    assert abs(t.mean() - .75) < 4*((1/48)/500)**.5                   # uniform: the larger share is on average 3/4

def test_noise_statistics():
    torch.manual_seed(0)
    for shape in (50, 4), (50, 4, 6), (50, 4, 6, 6):
        scale, shift = [torch.tensor(v).view(-1, *[1]*(len(shape)-2)) for v in ([1., .1, 7., 0.], [0., 5., -3., 2.])]
        x = shift + scale*torch.rand(shape)
        e, dims = noise_like(x, 4000), [d for d in range(len(shape)) if d != 1]
        k = e.numel()/4
        mean, sd = x.mean(dims), x.std(dims, correction=0)
        assert ((e.mean(dims) - mean).abs() <= 5*sd/k**.5 + 1e-5).all()
        assert ((e.std(dims) - sd).abs() <= 5*sd/(2*k)**.5 + 1e-5).all()

@pytest.mark.parametrize('f', [between, noise_like])
def test_points_refusals(f):
    x = torch.randn(4, 3)
    for n in 0, -2:
        with pytest.raises(ValueError, match=f'at least 1, not {n}'): f(x, n)
    with pytest.raises(ValueError, match='no example'): f(x[:0], 3)
    with pytest.raises(ValueError, match='int64'): f(x.long(), 3)
    with pytest.raises(TypeError, match='list'): f([1., 2.], 3)

def test_between_needs_two():
    with pytest.raises(ValueError, match='two examples'): between(torch.randn(1, 3), 3)

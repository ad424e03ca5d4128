"fast_double_backward against PyTorch's own derivatives: layers, options, orders, networks, and all that is passed on"
import copy, pickle, subprocess, sys, textwrap, threading, warnings, weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.autograd import forward_ad, grad
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from gradreg import double_backward
from gradreg.callbacks import DoubleBack, FrobReg, JacReg, SpectReg
from gradreg.double_backward import fast_double_backward
from gradreg.models import cifar_resnet, lenet5, mlp, resnet18
from gradreg.penalties import double_back, frob_reg, spect_reg
from nets import F64

on_each_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])

def everything(): return fast_double_backward(min_work=0)
def tensor(*shape, dtype=F64, device='cpu'): return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()
def served(y): return y.grad_fn.name().startswith(('_ConvolutionB', '_BatchNormB'))

def derivatives(y, inputs, orders):
    "Gradients of the first order in all inputs, then those of their squares, and so on."
    found, loss = [], y.sin().sum()
    for i in range(orders):
        found.append(grad(loss, inputs, create_graph=i+1 < orders, allow_unused=True))
        loss = sum(g.square().sum() for g in found[-1] if g is not None)
    return found

def compare(f, inputs, orders=3, reference=None, rtol=1e-8):
    with everything(): y = f(*inputs)
    wanted = (reference or f)(*inputs)
    assert served(y) and not served(wanted)
    assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert_close(derivatives(y, inputs, orders), derivatives(wanted, inputs, orders), rtol=rtol, atol=1e-9)

# ---------------------------------------------------------------- convolution

conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OPTIONS = [{}, dict(stride=2), dict(padding=1), dict(dilation=2), dict(groups=2), dict(padding='same'),
           dict(padding='valid'), dict(padding='same', dilation=3),
           dict(stride=3, padding=2, dilation=2, groups=2), dict(stride=(2,), padding=[1])]

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('n', [1, 2, 3])
def test_convolution(n, options, bias):
    torch.manual_seed(0)
    x, w = tensor(2, 4, *(6, 5, 7)[:n]), tensor(6, 4//options.get('groups', 1), *(3, 2, 3)[:n])
    compare(lambda x, w, *b: conv[n](x, w, *b, **options), [x, w, *[tensor(6)]*bias], orders=3 if n < 3 else 2)

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_geometry(data):
    torch.manual_seed(0)
    n, few = data.draw(st.integers(1, 2), 'axes'), st.integers(1, 3)
    each = lambda o: tuple(data.draw(o) for _ in range(n))
    groups, kernel, dilation, padding = data.draw(few), each(few), each(few), each(st.integers(0, 2))
    size = tuple(d*(k-1) + 1 + data.draw(st.integers(0, 4)) for k, d in zip(kernel, dilation))
    x, w = tensor(data.draw(few), 2*groups, *size), tensor(data.draw(few)*groups, 2, *kernel)
    options = dict(stride=each(few), padding=padding, dilation=dilation, groups=groups)
    compare(lambda x, w: conv[n](x, w, **options), [x, w], orders=2)

def test_the_inner_pass_leaves_the_weights_alone():
    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default: masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))
    x, w, masks = tensor(2, 3, 8, 8), tensor(4, 3, 3, 3), []
    with everything(): y = F.conv2d(x, w)
    with Masks():
        grad(y.sum(), x, retain_graph=True)
        assert masks == [(True, False, False)]
        grad(y.sum(), w)
    assert masks[1:] == [(False, True, False)]

@pytest.mark.parametrize('frozen', ['x', 'w', 'b'])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = dict(x=tensor(2, 3, 6, 6), w=tensor(4, 3, 3, 3), b=tensor(4))
    inputs[frozen] = inputs[frozen].detach()
    ask = [o for o in inputs.values() if o.requires_grad]
    with everything(): y = F.conv2d(*inputs.values())
    assert_close(derivatives(y, ask, 2), derivatives(F.conv2d(*inputs.values()), ask, 2))

def test_shared_weights_are_added_up():
    x, w = tensor(2, 3, 9, 9), tensor(3, 3, 3, 3)
    compare(lambda x, w: F.conv2d(F.conv2d(x, w).sin(), w), [x, w])

# ---------------------------------------------------------------- normalization

def by_hand(x, w, b, eps=1e-5, dims=None):
    dims = dims or [0, *range(2, x.ndim)]
    per = lambda o, default: default if o is None else o.view(1, -1, *[1]*(x.ndim-2))
    v, m = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - m)/(v + eps).sqrt()*per(w, 1) + per(b, 0)

AFFINE = [(True, True), (True, False), (False, True), (False, False)]
each_affine = pytest.mark.parametrize('weight,bias', AFFINE, ids=str)
def affine(weight, bias, c): return tensor(c) if weight else None, tensor(c) if bias else None

@each_affine
@pytest.mark.parametrize('shape', [(7, 3), (4, 3, 5), (2, 3, 4, 3), (2, 3, 2, 3, 2)], ids=len)
def test_batch_norm(shape, weight, bias):
    torch.manual_seed(0)
    w, b = affine(weight, bias, 3)
    f = lambda x, *_: F.batch_norm(x, None, None, w, b, True, eps=1e-3)
    inputs = [o for o in (tensor(*shape), w, b) if o is not None]
    compare(f, inputs, orders=3, reference=lambda x, *_: by_hand(x, w, b, 1e-3))  # PyTorch has no third derivative,
    if weight or not bias: compare(f, inputs, orders=2)  # and for a bias alone no second one

@each_affine
def test_instance_norm(weight, bias):
    w, b = affine(weight, bias, 3)
    f = lambda x, *_: F.instance_norm(x, weight=w, bias=b)
    inputs = [o for o in (tensor(2, 3, 5, 4), w, b) if o is not None]
    with everything(): y, again = f(*inputs), f(*inputs)
    assert served(y._base if y._is_view() else y)
    assert torch.equal(y, f(*inputs))
    if weight or not bias: # PyTorch has no second derivative for a bias alone
        assert_close(derivatives(y, inputs, 2), derivatives(f(*inputs), inputs, 2), rtol=1e-8, atol=1e-9)
    wanted = by_hand(inputs[0], w, b, dims=[2, 3])
    assert_close(derivatives(again, inputs, 3), derivatives(wanted, inputs, 3), rtol=1e-7, atol=1e-8)

@pytest.mark.parametrize('of', ['w', 'b', 'wb'])
def test_a_penalty_on_the_gradient_of_the_affine_part(of):
    x, w, b = tensor(6, 3, 4), tensor(3), tensor(3)
    def found(context):
        with context: y = F.batch_norm(x, None, None, w, b, True)
        gs = grad(y.sin().sum(), [dict(w=w, b=b)[o] for o in of], create_graph=True)
        return grad(sum(g.square().sum() for g in gs), [x, w, b])
    assert_close(found(everything()), found(nullcontext()), rtol=1e-9, atol=1e-10)

@pytest.mark.parametrize('options', [{}, dict(momentum=None), dict(momentum=.3), dict(affine=False), dict(eps=.1),
                                     dict(track_running_stats=False)], ids=str)
def test_a_module_and_its_running_statistics(options):
    ours, theirs = [nn.BatchNorm2d(3, **options) for _ in range(2)]
    for i in range(3):
        x = torch.randn(4, 3, 5, 5).requires_grad_()
        with everything(): y = ours(x)
        assert served(y) and torch.equal(y, theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers()))

def test_a_channel_far_from_zero():
    x = (torch.randn(16, 2, 8, 8)*1e-2 + 10).requires_grad_()
    found = []
    for context, o in (everything(), x), (nullcontext(), x.detach().double().requires_grad_()):
        with context: y = F.batch_norm(o, None, None, training=True)
        gx, = grad((y*y.detach().roll(1, 0)).sum(), o, create_graph=True)
        found.append(grad(gx.square().sum(), o)[0])
    assert (found[0] - found[1]).norm() < 2e-3*found[1].norm()

# ---------------------------------------------------------------- networks

def penalised(net, x, y, penalty, context):
    "Weight gradients of a penalised loss, by one backward pass; the logits."
    x = x.detach().requires_grad_()
    with context: z = net(x)
    g = torch.Generator(x.device).manual_seed(1)  # of probes and signs
    losses = F.cross_entropy(z, y, reduction='none')
    pen = double_back(losses, x) if penalty is double_back else penalty(z, x, generator=g)
    net.zero_grad()
    (F.cross_entropy(z, y) + .1*pen.mean()).backward()
    return z.detach(), [p.grad for p in net.parameters()]

def gan():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                         nn.ConvTranspose2d(8, 4, 4, 2), nn.InstanceNorm2d(4), nn.LeakyReLU(.2, inplace=True),
                         nn.Flatten(), nn.LazyLinear(5))

def normed():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding_mode='reflect', padding=1))
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 5))

NETS = {'lenet5': (lambda: lenet5(5, bn=True), (1, 28, 28)),
        'cifar_resnet': (lambda: cifar_resnet(5, 8, 1), (3, 16, 16)),
        'resnet18': (lambda: resnet18(5), (3, 16, 16)), 'mlp': (lambda: mlp((12, 9, 5)), (12,)),
        'gan': (gan, (3, 8, 8)), 'weight norm': (normed, (3, 8, 8))}

def twins(name, n=6, device='cpu', dtype=F64):
    torch.manual_seed(0)
    build, shape = NETS[name]
    x, y, net = torch.randn(n, *shape), torch.randint(5, (n,)), build()
    net(x)
    net, x, y = net.to(device, dtype), x.to(device, dtype), y.to(device)
    return net, copy.deepcopy(net), x, y

@on_each_device
@pytest.mark.parametrize('penalty', [spect_reg, double_back, frob_reg], ids=lambda o: o.__name__)
@pytest.mark.parametrize('name', NETS)
def test_weight_gradients_of_a_penalty(name, penalty, device):
    ours, theirs, x, y = twins(name, device=device)
    z, found = penalised(ours, x, y, penalty, everything())
    z_plain, wanted = penalised(theirs, x, y, penalty, nullcontext())
    if device == 'cpu': assert torch.equal(z, z_plain)
    assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert_close(list(ours.buffers()), list(theirs.buffers()), rtol=0 if device == 'cpu' else 1e-9, atol=0)

def test_lenet5_is_left_as_it_is():
    ours, theirs, x, y = [lenet5(), lenet5(), torch.randn(8, 1, 28, 28), torch.randint(10, (8,))]
    theirs.load_state_dict(ours.state_dict())
    found = penalised(ours, x, y, spect_reg, fast_double_backward())[1]
    wanted = penalised(theirs, x, y, spect_reg, nullcontext())[1]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))

def test_which_convolutions_are_served():
    x = torch.randn(2, 16, 16, 16)
    with fast_double_backward(): small, large = nn.Conv2d(16, 8, 3)(x), nn.Conv2d(16, 64, 3)(x)  # 226,000 and 1,806,000
    assert not served(small) and served(large)

def test_float32_is_as_near_as_pytorch():
    ours, theirs, x, y = twins('cifar_resnet', dtype=torch.float32)
    exact = penalised(copy.deepcopy(theirs).double(), x.double(), y, double_back, nullcontext())[1]
    def off(net, context):
        found = penalised(net, x, y, double_back, context)[1]
        return sum((a.double() - b).norm() for a, b in zip(found, exact))
    assert off(ours, everything()) < 3*off(theirs, nullcontext())

@on_each_device
def test_autocast(device):
    net, _, x, y = twins('cifar_resnet', device=device, dtype=torch.float32)
    def found(context, dtype=torch.float32, bf16=True):
        a, o = copy.deepcopy(net).to(dtype), x.to(dtype).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=bf16), context: z = a(o)
        assert z.dtype == (torch.bfloat16 if bf16 else dtype)
        gx, = grad(z.to(dtype).logsumexp(1).sum(), o, create_graph=True)
        (z.to(dtype).logsumexp(1).mean() + gx.square().sum()).backward()
        return z, torch.cat([p.grad.flatten().double() for p in a.parameters()])
    (z, a), (z_plain, b), (_, exact) = found(everything()), found(nullcontext()), found(nullcontext(), F64, False)
    if device == 'cpu': assert torch.equal(z, z_plain)
    assert (a - exact).norm() < 1.3*(b - exact).norm()  # bfloat16 is that far off by itself

@on_each_device
def test_float64_is_not_cast_by_autocast(device):
    x, w = tensor(2, 3, 6, 6, device=device), tensor(4, 3, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16), everything(): assert F.conv2d(x, w).dtype == F64

@pytest.mark.parametrize('f', [lambda: nn.Conv2d(16, 16, 3), lambda: nn.BatchNorm2d(16)], ids=['conv', 'norm'])
def test_channels_last_is_kept(f):
    f = f().to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    with everything(): y = f(x)
    gx, = grad(y, x, y.detach(), create_graph=True)
    again, = grad(gx.square().sum(), x, allow_unused=True) if isinstance(f, nn.BatchNorm2d) else (gx,)
    for o in y, gx, again: assert o.is_contiguous(memory_format=torch.channels_last)

# ---------------------------------------------------------------- what is passed on

def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten()).double()

def test_evaluation_and_no_grad_pass():
    net, x = small_net(), tensor(2, 3, 6, 6)
    with everything():
        assert not served(net[1].eval()(x[:, :1].expand(2, 4, 6, 6)))
        with torch.no_grad(): assert not net(x).requires_grad

@pytest.mark.parametrize('call', [
    lambda: F.conv2d(tensor(3, 6, 6), tensor(4, 3, 3, 3)),
    lambda: F.conv_transpose2d(tensor(2, 3, 6, 6), tensor(3, 4, 3, 3)),
    lambda: F.conv2d(tensor(2, 3, 6, 6).to(torch.complex128), tensor(4, 3, 3, 3).to(torch.complex128)),
    lambda: F.conv2d(torch.empty(0, 3, 6, 6), torch.randn(4, 3, 3, 3).requires_grad_()),
    lambda: F.instance_norm(tensor(2, 3, 6), torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)),
    lambda: F.layer_norm(tensor(2, 3), (3,)), lambda: F.group_norm(tensor(2, 4, 3), 2)])
def test_passes(call):
    with everything(): assert not served(call())

def test_other_tensors_pass():
    x = TensorImage(torch.randn(2, 3, 6, 6)).requires_grad_()
    with everything(): y = F.conv2d(x, torch.randn(4, 3, 3, 3))
    assert type(y) is TensorImage and not served(y)

@pytest.mark.parametrize('call,error,words', [
    (lambda: F.batch_norm(tensor(1, 3), None, None, training=True), ValueError, 'more than 1 value per channel'),
    (lambda: F.conv2d(tensor(2, 3, 6, 6), tensor(4, 2, 3, 3)), RuntimeError, 'channels'),
    (lambda: F.conv2d(tensor(2, 3, 6, 6), tensor(4, 3, 9, 9)), RuntimeError, 'size'),
    (lambda: F.conv2d(tensor(2, 3, 6, 6), tensor(4, 3, 3, 3), padding='full'), RuntimeError, 'padding'),
    (lambda: F.conv2d(tensor(2, 3, 6, 6), tensor(4, 3, 3, 3), padding='same', stride=2), RuntimeError, 'strided'),
    (lambda: F.conv2d(tensor(2, 3, 6, 6), torch.randn(4, 3, 3, 3)), RuntimeError, 'type')])
def test_errors_are_pytorchs_own_and_leave_nothing_behind(call, error, words):
    with pytest.raises(error, match=words):
        with everything(): call()
    assert not served(F.conv2d(tensor(2, 3, 6, 6), tensor(4, 3, 3, 3)))

def test_torch_func_inside():
    net, x = small_net(), torch.randn(4, 3, 6, 6, dtype=F64)
    per_example, together = nn.Sequential(net[0], net[2]), nn.Sequential(net[0], nn.InstanceNorm2d(4))
    jacobian = partial(torch.autograd.functional.jacobian, vectorize=True)
    wanted = vmap(jacrev(per_example))(x), jacrev(together)(x), jacobian(together, x)
    with everything():
        assert_close(vmap(jacrev(per_example))(x), wanted[0])
        assert_close(jacrev(together)(x), wanted[1])
        assert_close(jacobian(together, x), wanted[2])
        y = functional_call(net[0], dict(net[0].named_parameters()), x)
    assert served(y)

def test_forward_mode_passes():
    x, v, net = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6), nn.Conv2d(3, 4, 3)
    with forward_ad.dual_level(), everything():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v))).tangent
    assert_close(found, net(v) - net(torch.zeros_like(v)))

def test_batched_backward_passes():
    ours, x = small_net(), tensor(3, 3, 6, 6)
    theirs, rows = copy.deepcopy(ours), torch.eye(4, dtype=F64)
    def found(net, context):
        with context: z = net(x).unflatten(1, (5, -1)).mean(2)[:, :4]
        J, = grad(z, x, rows[:, None].expand(4, 3, 4), create_graph=True, is_grads_batched=True)
        first = grad(J.square().sum(), [x, *net.parameters()], create_graph=True, allow_unused=True)
        each = grad(J.square().sum((0, 2, 3, 4)), net[0].weight, torch.eye(3, dtype=F64), is_grads_batched=True)
        return first, each
    assert_close(found(ours, everything()), found(theirs, nullcontext()), rtol=1e-8, atol=1e-9)

def test_inside_a_compiled_loss():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    def loss(x):
        with everything(): return net(x).square().sum()
    x = torch.randn(2, 3, 6, 6)
    assert_close(torch.compile(loss, backend='eager', fullgraph=True)(x), loss(x))

@pytest.mark.parametrize('kind', ['outside', 'inside', 'within'])
def test_checkpointing(kind):
    "The context around the whole, around a checkpointed block's both passes, or within the block."
    ours, x = small_net(), tensor(2, 3, 6, 6)
    theirs = copy.deepcopy(ours)
    def within(x):
        with everything(): return ours(x)
    how = dict(outside={}, inside=dict(context_fn=lambda: (everything(), everything())), within={})[kind]
    with everything() if kind == 'outside' else nullcontext():
        z = checkpoint(within if kind == 'within' else ours, x, use_reentrant=False, **how)
    names, stack = set(), [z.grad_fn]
    while stack:
        node = stack.pop()
        names.add(node.name())
        stack += [o for o, _ in node.next_functions if o]
    assert ('_ConvolutionBackward' in names) == (kind != 'outside')
    found = [grad(spect_reg(o, x, torch.ones_like(o)).sum(), list(net.parameters()), allow_unused=True)
             for o, net in ((z, ours), (theirs(x), theirs))]
    assert_close(*found)

# ---------------------------------------------------------------- the context

def test_without_the_context_nothing_changes():
    net, x = small_net(), tensor(2, 3, 6, 6)
    with everything(): assert 'Convolution' in net[0](x).grad_fn.name() and served(net[0](x))
    names = [o.grad_fn.name() for o in (net[0](x), net[:2](x))]
    assert names == ['ConvolutionBackward0', 'NativeBatchNormBackward0']

def test_nested_and_entered_twice():
    context, f, x = everything(), nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    with context:
        with context, fast_double_backward(): assert served(f(x))
        assert served(f(x))
    assert not served(f(x))
    with context: assert served(f(x))

def test_other_threads_are_not_touched():
    f, x, found = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6), []
    with everything():
        thread = threading.Thread(target=lambda: found.append(served(f(x))))
        thread.start(); thread.join()
    assert found == [False]

def test_a_network_can_still_be_copied_and_stored():
    net, x = small_net(), tensor(2, 3, 6, 6)
    with everything():
        net(x)
        other = copy.deepcopy(net)
    assert_close(pickle.loads(pickle.dumps(net))(x), other(x))

def test_the_graph_goes_when_its_tensors_go():
    x, w = tensor(2, 3, 6, 6), tensor(4, 3, 3, 3)
    with everything(): y = F.batch_norm(F.conv2d(x.sin(), w), None, None, training=True)
    inner, = grad(y.sin().sum(), x, create_graph=True)
    node = weakref.ref(y.grad_fn)
    inner.square().sum().backward()
    del y, inner
    assert node() is None

def test_double_use_needs_retain_graph():
    x, w = tensor(2, 3, 6, 6), tensor(4, 3, 3, 3)
    with everything(): y = F.conv2d(x, w).sum()
    y.backward()
    with pytest.raises(RuntimeError, match='second time'): y.backward()

def test_changed_in_place():
    x, w = tensor(2, 3, 6, 6), tensor(4, 3, 3, 3)
    with everything(): y = F.conv2d(x.sin(), w).sum()
    with torch.no_grad(): w.add_(1)
    with pytest.raises(RuntimeError, match='inplace'): grad(y, x)

# ---------------------------------------------------------------- the compiled formula

@pytest.fixture
def compiler(monkeypatch):
    "What stands for torch.compile on this machine; nothing stays behind."
    monkeypatch.setattr(double_backward, '_failed', [])
    yield lambda f: monkeypatch.setattr(double_backward, '_compiler', f)
    torch._dynamo.reset()

def arguments(dtype=F64):
    torch.manual_seed(0)
    u, gy, x = [torch.randn(4, 3, 5, dtype=dtype) for _ in range(3)]
    return u, None, torch.rand(3, dtype=dtype), gy, x, torch.rand(3, dtype=dtype), x.mean([0, 2]), x.std([0, 2])

def test_compiled(compiler):
    compiler(lambda: torch.compile(double_backward._formula, backend='aot_eager', dynamic=False, recompile_limit=64))
    assert_close(double_backward._compiled(*arguments()), double_backward._formula(*arguments()))
    assert not double_backward._failed

def test_where_nothing_compiles(compiler):
    def broken(): raise RuntimeError('no C compiler')
    compiler(broken)
    with pytest.warns(UserWarning, match='no C compiler'): assert double_backward._compiled(*arguments()) is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert double_backward._compiled(*arguments()) is None  # said once

def test_out_of_memory_is_no_missing_compiler(compiler):
    def full(): raise torch.OutOfMemoryError('full')
    compiler(full)
    with pytest.raises(torch.OutOfMemoryError): double_backward._compiled(*arguments())

# ---------------------------------------------------------------- several processes

def test_distributed(tmp_path):
    "Two processes with half of the batch each: the mean gradient of both."
    script = tmp_path/'two.py'
    script.write_text(textwrap.dedent('''
        import copy, sys, torch
        from torch import distributed, nn
        from torch.nn.parallel import DistributedDataParallel
        from gradreg.double_backward import fast_double_backward
        from gradreg.penalties import spect_reg
        distributed.init_process_group('gloo', init_method=f'file://{sys.argv[1]}', rank=int(sys.argv[2]), world_size=2)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten()).double()
        alone, x = [copy.deepcopy(net) for _ in range(2)], torch.randn(2, 3, 3, 6, 6, dtype=torch.float64)
        def backward(net, x, **kw):
            x = x.detach().requires_grad_()
            if kw: z = net(x)
            else:
                with fast_double_backward(min_work=0): z = net(x)
            (z.sum() + spect_reg(z, x, torch.ones_like(z)).sum()).backward()
        both = DistributedDataParallel(net)
        backward(both, x[int(sys.argv[2])])
        for o, images in zip(alone, x): backward(o, images, plain=True)
        for p, *qs in zip(net.parameters(), *[o.parameters() for o in alone]):
            torch.testing.assert_close(p.grad, sum(q.grad for q in qs)/2)
        distributed.destroy_process_group()
    '''), encoding='utf-8')
    root = Path(__file__).resolve().parents[1]
    calls = [[sys.executable, script, tmp_path/'meet', str(rank)] for rank in range(2)]
    runs = [subprocess.Popen(o, cwd=root, stderr=subprocess.PIPE, text=True) for o in calls]
    for o in runs:
        error = o.communicate(timeout=600)[1]
        assert o.returncode == 0, error[-2000:]

# ---------------------------------------------------------------- the callbacks

class Names(Callback):
    "Did a node of ours make the output of each training batch? Is `forward` the model's own again?"
    def before_fit(self): self.nodes, self.own = [], []
    def after_pred(self):
        if not self.training: return
        names, stack = [], [self.pred.grad_fn]
        while stack:
            names.append((node := stack.pop()).name())
            stack += [o for o, _ in node.next_functions if o]
        self.nodes.append('_BatchNormBackward' in names)
        self.own.append('forward' not in vars(self.model))

def learner(*cbs, net=None):
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Conv2d(1, 3, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(243, 4))
    x, y = torch.randn(48, 1, 28, 28), torch.arange(48) % 4
    ds = [list(zip(x[i::2], y[i::2])) for i in range(2)]
    dls = DataLoaders.from_dsets(*ds, bs=6, shuffle=False, num_workers=0, device='cpu')
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=[*cbs, Names()])
    return learn

def fit(*cbs, **kw):
    learn = learner(*cbs, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
    return learn

def modes(): return _get_current_function_mode_stack()

def test_only_batches_with_a_penalty_are_served():
    learn = fit(SpectReg(.1, every=2))
    assert learn.names.nodes == [True, False]*4 and all(learn.names.own) and not modes()

@pytest.mark.parametrize('cls', [SpectReg, FrobReg, JacReg, DoubleBack])
def test_training_is_the_same_within_rounding(cls):
    fast, native = [fit(cls(.1, fast=o)) for o in (True, False)]
    assert_close(list(fast.model.state_dict().values()), list(native.model.state_dict().values()), rtol=1e-4, atol=1e-4)

class Breaks(nn.Module):
    "A layer whose third call raises."
    def __init__(self, error): super().__init__(); self.error, self.n = error, 0
    def forward(self, x):
        self.n += 1
        if self.n == 3: raise self.error
        return x

@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt(), CancelFitException()], ids=repr)
def test_a_broken_forward_pass_leaves_nothing_behind(error):
    net = nn.Sequential(nn.Conv2d(1, 3, 3, 3), nn.BatchNorm2d(3), Breaks(error), nn.Flatten(), nn.Linear(243, 4))
    with pytest.raises(type(error)) if not isinstance(error, CancelFitException) else nullcontext():
        fit(SpectReg(.1), FrobReg(.1), net=net)
    assert not modes() and 'forward' not in vars(net) and not served(net[:2](torch.randn(2, 1, 28, 28)))

def test_a_batch_cancelled_before_its_forward_pass():
    class Skip(Callback):
        order = SpectReg.order + 1
        def before_batch(self):
            assert self.training == ('forward' in vars(self.model))
            if self.train_iter == 3 and self.training: raise CancelBatchException
    learn = fit(SpectReg(.1), Skip())
    assert 'forward' not in vars(learn.model) and len(learn.names.nodes) == 7

def test_a_forward_that_somebody_else_has_put_there():
    net, calls = nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), []
    inner = net.forward
    def mine(x):
        calls.append(len(modes()))
        return inner(x)
    net.forward = mine
    fit(SpectReg(.1), FrobReg(.1), net=net)
    assert net.forward is mine and set(calls) == {0, 2}  # two callbacks in training, none in validation

def test_other_contexts_by_a_subclass():
    seen = []
    class Mine(SpectReg):
        def around(self):
            @contextmanager
            def context():
                seen.append('in')
                try: yield
                finally: seen.append('out')
            return [*super().around(), context()]
    fit(Mine(.1, every=4))
    assert seen == ['in', 'out']*2

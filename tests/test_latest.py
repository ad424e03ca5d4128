"The installed package alone: `make test-latest` runs this with the newest fastai and fastcore, without other tools"

import pkgutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import requires
from pathlib import Path
import pytest, torch
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
import gradreg
from gradreg.callbacks import DoubleBack, SpectReg
from gradreg.data import image_dls
from gradreg.models import lenet5
from gradreg.penalties import spect_reg

MODULES = sorted(m.name for m in pkgutil.iter_modules(gradreg.__path__))
TOOLS = 'nbdev execnb ghapi jupyterlab nbclient nbconvert nbformat sympy pytest ruff'.split()  # of dev_requirements

def test_every_module_imports_without_development_tools():
    assert {'jacobians', 'penalties', 'models', 'data', 'callbacks'} <= set(MODULES)
    code = f"""if True:
        import importlib, sys
        sys.modules.update(dict.fromkeys({TOOLS}))  # None: an import of these fails
        for m in {MODULES}: importlib.import_module('gradreg.' + m)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr

def test_the_installed_package_asks_for_no_development_tool():
    asked = [r for r in requires('gradreg') if 'extra ==' not in r]
    assert any(r.startswith('fastai') for r in asked)
    assert not [r for r in asked if r.startswith((*TOOLS, 'fastcore'))]  # fastai brings the fastcore it wants
    assert not [r for r in asked if '<' in r]                            # no caps

def test_the_version_is_that_of_settings_ini():
    ini = ConfigParser(delimiters=['='])
    assert ini.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
    assert gradreg.__version__ == ini['DEFAULT']['version']

@pytest.mark.filterwarnings('ignore:load_learner')
def test_a_fit_with_penalties_and_its_export(tmp_path):
    torch.manual_seed(0)
    dls = image_dls('digits', per_class=5, n_valid=50, bs=25)
    dls.path = tmp_path
    spect, double = SpectReg(.03), DoubleBack(1.)
    learn = Learner(dls, lenet5(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[spect, double])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    names = list(learn.recorder.metric_names)
    assert names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'spect_reg', 'double_back', 'time']
    for cb in spect, double: assert len(cb.penalties) == 4 and all(0 < p < float('inf') for p in cb.penalties)
    learn.export('a.pkl')
    with learn.no_bar(): want = learn.get_preds()[0]
    again = load_learner(tmp_path/'a.pkl')
    with again.no_bar(): torch.testing.assert_close(again.get_preds(dl=dls.valid)[0].cpu(), want.cpu())
    assert again.spect_reg.lam == .03 and again.double_back.lam == 1

def test_a_plain_training_step():
    torch.manual_seed(0)
    net, x, y = lenet5(), torch.rand(8, 1, 28, 28, requires_grad=True), torch.arange(8)
    logits = net(x)
    loss = torch.nn.functional.cross_entropy(logits, y)
    (loss + .03*spect_reg(logits, x).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

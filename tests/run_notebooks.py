"""Runs notebooks, each in a process of its own that is forked from this one, which has imported what they all import.

A line of JSON on stdin has the path, a folder for temporary files, a file for stderr; the answer is the exit code."""
import json, os, signal, sys, tempfile
from pathlib import Path
import torch
from execnb.shell import CaptureShell
from nbdev.test import test_nb

if not torch.backends.cuda.is_built() or not os.path.exists('/dev/nvidiactl'):  # a fork must not inherit a GPU
    import fastai.learner, matplotlib.pyplot, pandas, scipy.stats, seaborn  # noqa: F401

torch.set_num_threads(1)
run_all,faults = CaptureShell.run_all,[]

def kinds(cell):
    shown = [o for o in cell.get('outputs', []) if o.get('name') != 'stderr']
    return {'a figure' if any(k.startswith('image/') for k in o.get('data', {})) else 'text' for o in shown}

def run_and_compare(shell, nb, preproc, **kw):
    "What each cell shows is compared in kind with what is stored."
    code = [c for c in nb.cells if c.cell_type == 'code' and not preproc(c)]
    stored = [kinds(c) for c in code]
    for c in code: c.outputs = []
    run_all(shell, nb, preproc=preproc, **kw)
    for c,old in zip(code, stored):
        unkept = {'text'} if c.source.rstrip().endswith(';') else set()  # execnb does not keep what such a cell prints
        gone = old - kinds(c) - unkept
        if new := kinds(c) - old: faults.append(f'shows {", ".join(new)} that is not stored:\n{c.source}')
        if gone: faults.append(f'no longer shows {", ".join(gone)} that is stored:\n{c.source}')

CaptureShell.run_all = run_and_compare

def run(path, tmp, err):
    "nbdev's own test of one notebook, in the notebook's folder."
    signal.alarm(900)
    for stream,file in (0, os.devnull), (1, os.devnull), (2, err):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
    os.environ['TMPDIR'],tempfile.tempdir = tmp,None
    ok,_ = test_nb(Path(path), skip_flags=[] if torch.cuda.is_available() else ['cuda'])
    for o in faults: print(f'Stored outputs are stale, execute the notebook. This cell {o}\n', file=sys.stderr)
    sys.exit(not ok or bool(faults))

if __name__ == '__main__':
    for line in sys.stdin:
        if not (child := os.fork()): run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

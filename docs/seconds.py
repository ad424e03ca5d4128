"How long each chapter runs on one core, in processor time: writes docs/seconds.csv (`make seconds`)."

import csv, os, platform, resource
from pathlib import Path
import nbformat, torch
from nbclient import NotebookClient

root = Path(__file__).resolve().parents[1]

def spent():
    "Processor seconds of all processes that were started from here and have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def measured(path):
    "Execute a notebook and throw its outputs away: a row of the table."
    start = spent()
    NotebookClient(
        nbformat.read(path, 4),
        timeout=None,
        kernel_name='python3',
        resources={'metadata': {'path': str(path.parent)}},
    ).execute()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return dict(
        notebook=path.relative_to(root / 'nbs').as_posix(),
        seconds=f'{spent() - start:.1f}',
        device=device,
        python=platform.python_version(),
        torch=torch.__version__,
    )

def main():
    os.environ.pop('GRADREG_SMOKE', None)
    os.environ['OMP_NUM_THREADS'] = '1'
    rows = [measured(p) for p in [root/'nbs/index.ipynb', *sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb'))]]
    with open(root/'docs/seconds.csv', 'w', encoding='utf-8', newline='') as f:
        out = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        out.writeheader()
        out.writerows(rows)

if __name__ == '__main__': main()

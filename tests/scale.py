"""Memory and time of large inputs: a table of a million lines, 200,000 files, 20,000 classes.

    python tests/scale.py [--part 1] [--out nbs/results/integrity.json]

Each is carried out in a child. TMPDIR should lie on a file system in memory, as /dev/shm: files are made by the million."""
import json, os, resource, tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from kills import arguments, each, ended, fork, note
from lift_nb.cli import main as lift_nb
from lift_nb.data.dataset import from_arrays
from lift_nb.data.tables import from_table
from lift_nb.experiments.run import run

def needed(job, folder:Path)->dict: # seconds of CPU, GB
    "Carry out a job in a child"
    found = folder/'needed.json'
    def measured():
        job()
        u = resource.getrusage(resource.RUSAGE_SELF)
        found.write_text(json.dumps(dict(seconds=round(u.ru_utime + u.ru_stime, 1), gb=round(u.ru_maxrss/1e6, 2))))
    assert ended(fork(measured, folder/'said'), 3000) == 0, (folder/'said').read_text()
    return json.loads(found.read_text())

def table(folder:Path, n:int):
    "A table of `n` lines, whose images exist and are not opened"
    for k in range(1000): (folder/f'images/{k:04}').mkdir(parents=True)
    for i in range(n): os.close(os.open(folder/f'images/{i % 1000:04}/{i:07}.jpg', os.O_CREAT | os.O_WRONLY))
    with open(folder/'table.csv', 'w') as f:
        f.write('path,label\n')
        f.writelines(f'images/{i % 1000:04}/{i:07}.jpg,class {i % 1000}\n' for i in range(n))
    return lambda: from_table(folder/'table.csv', root=folder, check=False)

def files(folder:Path, n:int):
    "`lift_nb data` on `n` images in a hundred folders"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder/'one.jpg')
    for c in range(100):
        (folder/f'images/{c:03}').mkdir(parents=True)
        for i in range(n//100): os.link(folder/'one.jpg', folder/f'images/{c:03}/{i:05}.jpg')
    return lambda: lift_nb(['data', str(folder/'images')])

def classes(folder:Path, n:int):
    "Train a linear classifier of `n` classes for an epoch, and test it on as many images"
    x, y = np.random.default_rng(0).integers(0, 255, (n, 32, 32), dtype=np.uint8), np.arange(n)
    data = from_arrays(x, y, x, y, [f'class {i}' for i in range(n)])
    options = dict(backbone='tiny_clip', method='lp', init='none', epochs=0, batch_size=128, expand=0, validate=False, device='cpu', echo=lambda line: None)
    return lambda: run(folder/'run', data=data, **options)

PARTS = {'a table of a million lines': (table, 10**6), 'lift_nb data on 200,000 files': (files, 200_000), 'test with 20,000 classes and images': (classes, 20_000)}

def measured(name:str, part:float)->dict: # of `PARTS`, part of its size
    "Make an input, and measure what it needs"
    make, n = PARTS[name]
    with tempfile.TemporaryDirectory() as folder: return needed(make(Path(folder), int(n*part)), Path(folder))

def main(argv=None):
    args = arguments(__doc__, ', '.join(PARTS), part=(1., 'part of the sizes, as .01')).parse_args(argv)
    note(args.out, 'scale', each(args.only or PARTS, lambda name: measured(name, args.part)))

if __name__ == '__main__': main()

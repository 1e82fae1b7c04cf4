"""Single bits are flipped in every file that is read again: each flip is refused in one sentence, or changes nothing.

    python tests/flips.py [--n 200] [--out nbs/results/integrity.json]

Bits are drawn at random over each file, and all bits of its first and last 64 bytes are among them."""
import random, tempfile
from pathlib import Path

import torch

from kills import DIGITS, SMALL, arguments, each, note
from lift_nb.core.errors import LiftError
from lift_nb.core.files import _read_result, _read_tensors
from lift_nb.evaluation.predictions import _borders_beside, _counts_beside, read_predictions
from lift_nb.experiments.reports import _history_beside
from lift_nb.experiments.run import run
from lift_nb.models.features import FeatureCache
from lift_nb.predictor import _read_lift
from lift_nb.training.checkpoints import _list_checkpoints, _newest_checkpoint

def plain(x):
    "What can be compared with =="
    if isinstance(x, torch.Tensor): return str(x.dtype), tuple(x.shape), x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v) for v in x]
    return x.to_csv() if hasattr(x, 'to_csv') else x

class Stop(Exception): pass

def made(folder:Path)->dict: # name → (file, what reads it)
    "The files of a finished and of an interrupted run"
    def stop(line):
        if line.startswith('epoch 1/'): raise Stop('here')
    options = dict(SMALL, data=DIGITS, method='lp', mda='plain', features=str(folder/'features'))
    run(folder/'run', **options)
    try: run(folder/'half', **{**options, 'echo': stop, 'save_steps': 2})
    except Stop: pass
    point, = _list_checkpoints(folder/'half/resume')[:1]
    for older in _list_checkpoints(folder/'half/resume')[1:]: older.unlink()
    features, cache = next((folder/'features').iterdir()), FeatureCache(folder, DIGITS)
    identity, key = _read_tensors(point)[1]['identity'], _read_tensors(features)[1]['fingerprint']
    def checkpoint():
        said = []
        found = _newest_checkpoint(point.parent, identity, said.append)
        if found is None: raise LiftError(said[0])
        return found
    r = folder/'run'
    return {'result.json': (r/'result.json', lambda: (_read_result(r/'result.json'), _counts_beside(r), _borders_beside(r))),
        'predictions.csv': (r/'predictions.csv', lambda: read_predictions(r)), 'history.csv': (r/'history.csv', lambda: _history_beside(r)),
        'model.safetensors': (r/'model.safetensors', lambda: _read_lift(r/'model.safetensors')),
        'checkpoint': (point, checkpoint), 'cached features': (features, lambda: cache.read(features, key))}

def flipped(path:Path, read, n:int, rng)->dict: # refused, unchanged
    "Flip bits one at a time; raises AssertionError for one that changes what is read"
    content, right, counts = path.read_bytes(), plain(read()), dict(refused=0, harmless=0)
    ends = [*range(min(512, 8*len(content))), *range(max(0, 8*len(content)-512), 8*len(content))]
    bits = {*ends, *(rng.randrange(8*len(content)) for _ in range(n))} if 8*len(content) > n else range(8*len(content))
    for bit in sorted(bits):
        changed = bytearray(content)
        changed[bit//8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try: found = plain(read())
        except LiftError as e: counts['refused'] += 1; assert len(str(e)) < 600 and '\n' not in str(e), e
        else:
            assert same(found, right), f'{path.name}: bit {bit} changes what is read'
            counts['harmless'] += 1
    path.write_bytes(content)
    return counts

def same(a, b):
    "Equal, but for the name of the field of the checksum, whose loss costs nothing but the check"
    def known(x): return [{k: v for k, v in x[0].items() if k in b[0] and k != 'sha256'}, *x[1:]]
    if isinstance(b, list) and isinstance(b[0], dict) and 'recipe' in b[0]: a, b = known(a), known(b)
    return repr(a) == repr(b)

def main(argv=None):
    args = arguments(__doc__, n=(200, 'random bits of each file, beside those of both ends'), seed=(0, 'of the random bits')).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        files = made(Path(folder))
        note(args.out, 'flips', each(files, lambda name: flipped(*files[name], args.n, random.Random(f'{args.seed} {name}'))))

if __name__ == '__main__': main()

"Two processes train as one: the same weights, losses and scores; one that dies ends the run, and the run goes on later"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from lift_nb.core.errors import LiftError
from lift_nb.data.loaders import SeededDL
from lift_nb.data.dataset import digits_lt
from lift_nb.training.distributed import _SharedDL, _distributed_fit
from lift_nb.experiments.run import run
from lift_nb.core.files import _read_tensors, _write_tensors
from lift_nb.learner import lift_plus_learner
from lift_nb.core.processes import run_on_main, _check_same_everywhere, init_distributed, _peer_failures_as_errors, shutdown_distributed, _rank, _world_size
from lift_nb.training.checkpoints import _loop_state, _list_checkpoints

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
env = {**{k: v for k, v in os.environ.items() if k not in ('WORLD_SIZE', 'RANK')}, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}

# The same program in one process and in two

class NaNFirst(Callback):
    "The first image of a batch has no number for a logit: in two processes only the first one sees it"
    order = 9
    def after_pred(self):
        if self.training and self.iter == 1 and _rank() == 0: self.learn.pred = self.pred.index_fill(0, torch.tensor([0]), torch.nan)

CASES = dict( # options of `lift_plus_learner`; 89 images in batches of 32, so that the last one is smaller, and odd
    pieces=dict(accum_step=4), lade=dict(loss='lade', accum_step=2), recompute=dict(loss='cb', modules='vpt+ssf', recompute=True),
    means=dict(loss='bs', modules='lora', init='class_mean'), coop=dict(head='coop', mda=False), skip=dict(nonfinite='skip', cbs=[NaNFirst]),
    fp16=dict(precision='fp16', accum_step=2))

def small(epochs=2, **options):
    set_seed(0)
    options = {**options, 'cbs': [cb() for cb in options.get('cbs', [])]}
    return lift_plus_learner(digits_lt(n_max=24, factor=1/12, n_test=3), 'tiny_clip', epochs=epochs, batch_size=32, expand=0, device='cpu', metrics=[accuracy], **options)

def trained(**options)->dict: # of tensors
    "Weights, losses, metrics, logits of five crops, and what the guard left out"
    learn = small(**options)
    with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
        learn.fit_lift()
        about = dict(losses=torch.stack(list(learn.recorder.losses)), metrics=torch.tensor([[float(v) if isinstance(v, (int, float)) else 0. for v in row] for row in learn.recorder.values]),
            left_out=torch.tensor((learn.scale_loss if learn.model.precision == 'fp16' else learn.stop_on_non_finite).left_out))
        about['logits'], about['labels'] = learn.logits(tte=True)
    with _distributed_fit(learn), learn.no_bar(), learn.no_logging(): about['inputs'] = learn.get_preds(with_input=True)[0]
    out = {k: v.as_subclass(torch.Tensor).contiguous().detach() for k, v in {**_loop_state(learn.model), **about}.items()}
    _check_same_everywhere(**{k: v.double().sum().item() for k, v in out.items() if k != 'metrics'}) # to the last bit
    return out

def weighted_draw(n=30):
    "Order of a pass whose images are drawn at random, as `SharedDL` of all processes together yields it"
    torch.manual_seed(_rank())
    dl = _SharedDL(SeededDL(range(n), bs=7, num_workers=2, after_item=[lambda i: torch.tensor(i)], get_idxs=lambda: torch.randint(n, (n,)).tolist()))
    return [dl.whole(b).tolist() for b in dl], dl.order

def mistakes()->list: # of sentences
    "What the processes say when something cannot be"
    said = []
    def noted(f, *args, **kwargs):
        try: f(*args, **kwargs)
        except LiftError as e: said.append(str(e))
    def no(): raise LiftError('not this one')
    noted(lift_plus_learner, 'digits_lt', 'tiny_clip', batch_size=33)
    noted(_check_same_everywhere, images=_rank())
    noted(run_on_main, no)
    return said

def program(folder:Path):
    "What each of the two processes does"
    init_distributed('cpu')
    for name, options in CASES.items(): run_on_main(_write_tensors, folder/f'{name}.safetensors', trained(**options))
    got, order = weighted_draw()
    _check_same_everywhere(order=order)
    run_on_main((folder/'said.json').write_text, json.dumps(dict(said=mistakes(), drawn=[sum(got, []), order], processes=_world_size())))
    shutdown_distributed()

TORCHRUN = ('torch.distributed.run', '--nproc_per_node', '2')
ACCELERATE = ('accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--main_process_port', '0')

def launch(launcher, *words, **kwargs):
    "Two processes"
    words = [sys.executable, '-m', *launcher, *map(str, words)]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)

def ended(p, seconds:int)->str: # what it printed
    "Wait for a launcher; after so many seconds it is told to end"
    try: return p.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        p.terminate() # ends the processes that it has started
        raise AssertionError(f'still there after {seconds} s: {p.communicate(timeout=60)[0]}') from None

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    p = launch(TORCHRUN, Path(__file__).name, folder, cwd=Path(__file__).parent)
    said = ended(p, 200)
    assert p.returncode == 0, said
    return folder

@pytest.mark.parametrize('name', CASES)
def test_two_processes_are_one(two, name):
    "Weights, losses, metrics (one of fastai's too) and logits of the same training in one process"
    (ours, theirs), eps = (trained(**CASES[name]), _read_tensors(two/f'{name}.safetensors')[0]), 2e-3 if name == 'fp16' else 2e-5
    assert ours.keys() == theirs.keys()
    for k, t in ours.items(): assert torch.allclose(t.float(), theirs[k].float(), atol=eps*max(1, float(t.nan_to_num().abs().max()) if t.numel() else 1), equal_nan=True), k
    assert ours['left_out'].tolist() == ([[0, 1], [1, 1]] if name == 'skip' else [])

def test_what_the_processes_say(two):
    found = json.loads((two/'said.json').read_text())
    assert found['processes'] == 2
    assert found['drawn'][0] == found['drawn'][1] # the main process's draw, each image in its place, with workers
    assert found['said'] == ['A batch of 33 images cannot be divided into 2 equal gradient-accumulation steps, 1 for each of 2 processes',
        'The processes differ: images is 0 in the first and 1 in process 2', 'not this one']

def test_a_lost_connection_is_a_sentence(monkeypatch):
    for name, value in dict(is_distributed=True, _rank=1, _world_size=2).items(): monkeypatch.setattr(f'lift_nb.core.processes.{name}', lambda v=value: v)
    with pytest.raises(LiftError, match='Process 2 of 2 lost the connection'), _peer_failures_as_errors(): raise RuntimeError('gloo: Connection closed by peer')
    with pytest.raises(RuntimeError, match='size mismatch'), _peer_failures_as_errors(): raise RuntimeError('size mismatch')

# The command line, a process that dies, and resume

RUN = dict(epochs=2, batch_size=16, expand=0, save_steps=2, validate=False, device='cpu')

def words(folder): return ['-m', 'lift_nb', '-d', 'digits_lt', '-b', 'tiny_clip', 'output_dir', folder, 'resume', 'True', *sum(([k, str(v)] for k, v in RUN.items()), [])]

def children(pid): # of the launcher
    return [int(n) for n in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for processes as Linux lists them')
def test_one_is_killed_and_both_go_on(tmp_path):
    "SIGKILL of the second process in the middle of a training: all ends within seconds, not with 0; the same command then reaches the weights of one process"
    p = launch(ACCELERATE, *words(tmp_path/'two'))
    end = time.monotonic() + 120
    while len(_list_checkpoints(tmp_path/'two/resume')) < 2 and p.poll() is None and time.monotonic() < end: time.sleep(.05)
    second = next(c for c in children(p.pid) if b'RANK=1' in Path(f'/proc/{c}/environ').read_bytes().split(b'\0'))
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    said = ended(p, 60)
    assert p.returncode != 0 and time.monotonic() - killed < 45, said
    assert not (tmp_path/'two/result.json').exists() and _list_checkpoints(tmp_path/'two/resume')
    p = launch(TORCHRUN, *words(tmp_path/'two'))
    said = ended(p, 120)
    assert p.returncode == 0 and said.count('Going on in epoch') == 1 and said.count('Results: ') == 1, said
    alone = run(output_dir=tmp_path/'one', echo=lambda line: None, **RUN)
    result = json.loads((tmp_path/'two/result.json').read_text())
    assert result['processes'] == 2 and alone['processes'] == 1 and result['per_class'] == alone['per_class']
    one, two = (_read_tensors(tmp_path/n/'model.safetensors')[0] for n in ('one', 'two'))
    assert one.keys() == two.keys() and all(torch.allclose(t, two[k], atol=2e-5) for k, t in one.items())
    names = sorted(f.name for f in (tmp_path/'one').iterdir())
    assert sorted(f.name for f in (tmp_path/'two').iterdir()) == names and len(list((tmp_path/'two/tensorboard').iterdir())) == len(list((tmp_path/'one/tensorboard').iterdir())) + 1

if __name__ == '__main__': program(Path(sys.argv[1]))

"""Trainings that are killed, and go on: their weights, predictions and losses are compared bit for bit with those of the undisturbed training.

    python tests/kills.py [--n 8] [--only LIFT+] [--out nbs/results/integrity.json]

Every child is a fork of this process, so that nothing is imported twice."""
import argparse, json, os, random, shutil, signal, sys, tempfile, time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np, torch
from PIL import Image

import lift_nb.experiments.results as results
from lift_nb.core.errors import LiftError
from lift_nb.core.files import _read_tensors, _write_json
from lift_nb.core.locks import _locked
from lift_nb.core.processes import shutdown_distributed
from lift_nb.data.dataset import digits_lt
from lift_nb.experiments.run import run
from lift_nb.experiments.sweeps import run_all

torch.set_num_threads(1)
DIGITS = digits_lt(n_max=40, n_test=1)
SMALL = dict(backbone='tiny_clip', epochs=2, batch_size=16, expand=0, validate=False, device='cpu', echo=lambda line: None)
VARIANTS = { # name → what differs from LIFT+ on the digits
    'LIFT+': {}, 'evaluated after each epoch': dict(validate=True), 'TTE': dict(tte=True), 'linear probing': dict(method='lp'),
    'cached features': dict(method='lp', mda='plain', features='features'), 'LoRA and SSF': dict(modules='lora+ssf'), 'prompts': dict(modules='vpt'),
    'Adapter': dict(modules='adapter'), 'BitFit': dict(modules='bitfit'), 'arbitrary entries': dict(method='aft'), 'LayerNorm': dict(modules='ln'),
    'full fine-tuning': dict(method='fft'), 'text tower': dict(method='text'), 'CoOp': dict(method='coop', mda=False),
    'CLIP-Adapter': dict(method='clip_adapter'), 'class means': dict(init='class_mean'), 'LADE': dict(loss='lade'), 'class-balanced loss': dict(loss='cb'),
    'accumulated gradients': dict(accum_step=4), 'clipped gradients': dict(clip_grad=.5), 'recomputed': dict(recompute=True),
    'bfloat16': dict(precision='bf16'), 'two image workers': dict(num_workers=2), 'a folder of images': dict(data='folder'),
    'a validation set': dict(data='folder', valid_pct=.2, validate=True), 'checkpoints after epochs only': dict(save_steps=None)}

# Children

def fork(job, said:Path|None=None, **env): # pid
    "Start a job in a child; its exit code is 0, 2 after a `LiftError`, 1 after anything else; `said` takes the sentence"
    if pid := os.fork(): return pid
    code = 1
    try:
        os.environ.update(env)
        sys.stdout = sys.stderr = open(said or os.devnull, 'a', encoding='utf-8')
        os.dup2(sys.stderr.fileno(), 2)
        job()
        code = 0
    except LiftError as e: code = print(e, flush=True) or 2
    except (KeyboardInterrupt, SystemExit): code = 3
    except BaseException:
        import traceback; traceback.print_exc(); sys.stderr.flush()
    finally: os._exit(code)

def ended(pid, seconds:float)->int|None: # exit code, minus the signal; None: still there
    "Wait for a child"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found: return os.waitstatus_to_exitcode(status)
        time.sleep(.01)

def killed(pid, number=signal.SIGKILL):
    "Send a signal, and wait for the end; was it still there?"
    with suppress(ProcessLookupError): os.kill(pid, number)
    code = ended(pid, 60)
    if code is None:
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        raise AssertionError(f'{signal.Signals(number).name} does not end it')
    assert code in (0, 3, -number), f'exit code {code} after {signal.Signals(number).name}'
    return code != 0

# When

OPERATIONS = {'open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.chmod', 'os.listdir', 'shutil.rmtree'}

def at_operation(folder:Path, act, first:int=1):
    "Call `act` with the number of each operation on files in a folder, before it is carried out"
    count, prefix = 0, str(folder)
    def hook(event, args):
        nonlocal count
        if event not in OPERATIONS or not isinstance(args[0], (str, os.PathLike)) or not str(args[0]).startswith(prefix): return
        count += 1
        if count >= first: act(count, event, args)
    sys.addaudithook(hook)

def die(*args): os.kill(os.getpid(), signal.SIGKILL)

def die_in_file(k:int):
    "End this process when half of its k-th file of tensors is written"
    whole, count = Path.write_bytes, 0
    def half(path, data):
        nonlocal count
        count += '.safetensors.' in path.name
        whole(path, data[:len(data)//2] if count == k else data)
        if count == k: die()
    Path.write_bytes = half

def workers_of(pid): return [int(n) for n in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

# One kill each: (job, folder, random numbers, (operations, files, seconds) of the undisturbed run) → was anything killed?

def by_operation(job, folder, rng, size):
    k = rng.randint(1, size[0])
    def disturbed(): at_operation(folder, die, k); job()
    return ended(fork(disturbed), 120) == -signal.SIGKILL

def in_file(job, folder, rng, size):
    k = rng.randint(1, size[1])
    def disturbed(): die_in_file(k); job()
    return ended(fork(disturbed), 120) == -signal.SIGKILL

def at_random(job, folder, rng, size, number=signal.SIGKILL):
    pid = fork(job)
    time.sleep(rng.uniform(0, size[2]))
    return killed(pid, number)

def by_sigterm(*args): return at_random(*args, number=signal.SIGTERM)
def by_sigint(*args): return at_random(*args, number=signal.SIGINT)

def a_worker(job, folder, rng, size):
    "SIGKILL of a process that loads images: one sentence, at once"
    said = folder.with_suffix('.said')
    said.unlink(missing_ok=True)
    pid, end = fork(job, said), time.monotonic() + rng.uniform(.3, 1)*size[2]
    while time.monotonic() < end: time.sleep(.01)
    found = workers_of(pid)
    if found: os.kill(rng.choice(found), signal.SIGKILL)
    code = ended(pid, 60)
    words = said.read_text(encoding='utf-8') if said.exists() else ''
    assert code in (0, 2) and words.count('\n') == (code == 2), f'exit code {code}: {words}'
    return code == 2

WAYS = dict(operation=by_operation, file=in_file, random=at_random, SIGTERM=by_sigterm, SIGINT=by_sigint)

# What is compared

def results_of(folder:Path)->dict:
    "Everything of a run that must not depend on interruptions"
    tensors = _read_tensors(folder/'model.safetensors')[0]
    result = json.loads((folder/'result.json').read_text(encoding='utf-8'))
    return dict({k: t.numpy().tobytes() if t.dtype != torch.bfloat16 else t.view(torch.int16).numpy().tobytes() for k, t in tensors.items()},
        **{f: (folder/f).read_bytes() for f in ('predictions.csv', 'history.csv')}, files=sorted(f.name for f in folder.iterdir()),
        result={k: result[k] for k in ('overall', 'mean_class', 'many', 'medium', 'few', 'per_class', 'fingerprint', 'class_counts')})

def measured(job, folder)->tuple: # operations, files of tensors, seconds
    "The undisturbed run"
    log, start = folder.with_suffix('.count'), time.monotonic()
    def counted():
        counts, whole = [0, 0], Path.write_bytes
        def count(n, *args): counts[0] = n
        def write(path, data): counts[1] += '.safetensors.' in path.name; return whole(path, data)
        at_operation(folder, count)
        Path.write_bytes = write
        job()
        log.write_text(json.dumps(counts))
    said = folder.with_suffix('.said')
    assert ended(fork(counted, said), 300) == 0, said.read_text()
    return *json.loads(log.read_text()), time.monotonic() - start

def images(root:Path):
    "A folder of small images"
    for c, n in dict(a=40, b=20, c=10).items():
        (root/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(np.random.default_rng([ord(c), i]).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root/c/f'{i}.png')
    return root

def job_of(name, options, place:Path, save_steps=1):
    "The run of a variant in a folder; only LIFT+ draws its picture and report, which take longer than such a training"
    options = dict(SMALL, data=DIGITS, save_steps=save_steps) | options
    if options['data'] == 'folder': options['data'] = str(place.parent/'images')
    if 'features' in options: options['features'] = str(place/'features')
    def job():
        if name != 'LIFT+': results._draw = results._try_report = lambda *args: None
        run(place/'run', resume=True, **options)
    return job

def variant(name, options, root:Path, n:int, rng)->dict: # way → kills
    "Kill a variant `n` times, about three times in a row before it may end, in each of the ways"
    whole, ways = root/'whole', dict(WAYS, worker=a_worker) if 'num_workers' in options else WAYS
    whole.mkdir()
    size = measured(job_of(name, options, whole), whole/'run')
    right, counts = results_of(whole/'run'), dict.fromkeys(ways, 0)
    plan = [w for w in ways for _ in range(n)]
    rng.shuffle(plan)
    while plan:
        shutil.rmtree(root/'broken', ignore_errors=True); (root/'broken').mkdir()
        chain, longest = [], rng.randint(1, 4)
        steps = options.get('save_steps', rng.choice([1, 1, 2, 3, None]))
        job = job_of(name, options, root/'broken', steps)
        while plan and len(chain) < longest and not (root/'broken/run/result.json').exists():
            if not ways[plan[-1]](job, root/'broken/run', rng, size): continue # it had ended; once more
            chain.append(plan.pop())
            counts[chain[-1]] += 1
        said = root/'broken/said'
        assert ended(fork(job, said), 300) == 0, f'{name} after {chain}: {said.read_text()}'
        found = results_of(root/'broken/run')
        odd = {k for k in {**right, **found} if found.get(k) != right.get(k)}
        assert not odd, f"{name} after {chain}, save_steps {steps}: {sorted(odd)[:5]} differ; {found['files']}"
    return counts

# Two processes, sweeps, locks

def two_processes(root:Path, n:int, rng)->dict:
    "Kill one process of two, or both; the other one ends by itself"
    def start(place):
        def job():
            run(place/'run', resume=True, data=DIGITS, save_steps=1, **SMALL)
            shutdown_distributed()
        port = str(rng.randint(20000, 30000))
        env = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        return [fork(job, place/f'said{r}', RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    counts = dict(first=0, second=0, both=0)
    (root/'whole').mkdir()
    begin = time.monotonic()
    assert [ended(p, 300) for p in start(root/'whole')] == [0, 0], (root/'whole/said0').read_text()
    seconds, right = time.monotonic() - begin, results_of(root/'whole/run')
    for way in [w for w in counts for _ in range(n)]:
        shutil.rmtree(root/'broken', ignore_errors=True); (root/'broken').mkdir()
        pids = start(root/'broken')
        time.sleep(rng.uniform(.2, 1)*seconds)
        for p in dict(first=pids[:1], second=pids[1:], both=pids)[way]: os.kill(p, signal.SIGKILL)
        codes = [ended(p, 60) for p in pids]
        assert None not in codes and {*codes} <= {0, 2, -9, -6}, f'{codes}: {(root/"broken/said0").read_text()} {(root/"broken/said1").read_text()}'
        counts[way] += -9 in codes
        assert [ended(p, 300) for p in start(root/'broken')] == [0, 0], (root/'broken/said0').read_text()
        found = results_of(root/'broken/run')
        assert found == right, f'two processes, {way}: {[k for k in right if found.get(k) != right[k]]} differ'
    return counts

def sweep(root:Path, n:int, rng)->dict:
    "Kill a sweep of three runs"
    runs = [(f'lr {lr}', dict({k: v for k, v in SMALL.items() if k not in ('echo', 'validate')}, data='digits_lt', epochs=1, lr=lr, batch_size=64,
        method='lp', mda=False)) for lr in (.01, .02, .04)]
    def job_in(place): return lambda: run_all(runs, place, echo=lambda line: None)
    def table(place):
        t = (place/'table.csv').read_text(encoding='utf-8').replace(str(place), '')
        return [[v for i, v in enumerate(l.split(',')) if i != t.split('\n')[0].split(',').index('seconds')] for l in t.splitlines()]
    size = measured(job_in(root/'whole'), root/'whole')
    right = table(root/'whole')
    counts = dict(operation=0, random=0, SIGTERM=0)
    for way in [w for w in counts for _ in range(n)]:
        shutil.rmtree(root/'broken', ignore_errors=True)
        counts[way] += WAYS[way](job_in(root/'broken'), root/'broken', rng, size)
        assert ended(fork(job_in(root/'broken'), root/'said'), 300) == 0, (root/'said').read_text()
        assert table(root/'broken') == right
        for r in (root/'whole').glob('*/result.json'):
            assert results_of(r.parent) == results_of(root/'broken'/r.parent.name), r.parent.name
    return counts

def locks(root:Path, rounds:int)->dict:
    "Four processes want a folder whose lock a dead process has left: one at a time has it"
    (root/'run').mkdir()
    barrier, twice = (context := get_context('fork')).Barrier(4), context.Value('i', 0)
    def want(first):
        for _ in range(rounds):
            if first: (root/'run/run.lock').write_text('process 999999 on another-host since 2026-01-01 00:00:00')
            barrier.wait(60)
            with suppress(LiftError), _locked(root/'run', lambda line: None):
                try: os.mkdir(root/'held'); time.sleep(.0005); os.rmdir(root/'held')
                except OSError: twice.value += 1 # two hold it
            barrier.wait(60)
    pids = [fork(lambda: want(i == 0)) for i in range(4)]
    assert [ended(p, 300) for p in pids] == [0]*4
    return dict(rounds=rounds, held_twice=twice.value)

# All

def note(out, section:str, values):
    "Write what was found into the file that the documentation shows"
    if not out: return
    path = Path(out)
    known = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    _write_json(path, {**known, section: {**known.get(section, {}), **values}})

def arguments(doc:str, what:str='', **numbers): # what `--only` chooses from; name → default and help
    "The options of a program that counts what it tried"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in numbers.items(): p.add_argument(f'--{name}', type=type(default), default=default, help=text)
    if what: p.add_argument('--only', action='append', help=f'of {what}; default: all')
    p.add_argument('--out', help='JSON file to note the results in')
    return p

def each(names, job)->dict: # name → result
    "Carry out a job for each name, and print what it finds"
    found = {}
    for name in names:
        found[name] = job(name)
        print(f'{name}: {found[name]}', flush=True)
    return found

def main(argv=None):
    what = ', '.join([*VARIANTS, 'two processes', 'sweep', 'locks'])
    args = arguments(__doc__, what, n=(4, 'kills of a variant in each way'), seed=(0, 'of the random moments')).parse_args(argv)
    special = {'two processes': two_processes, 'sweep': sweep, 'locks': lambda root, n, rng: locks(root, 1000*n)}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        images(Path(folder)/'images')
        def count(name):
            rng, root = random.Random(f'{args.seed} {name}'), Path(folder)/name.replace(' ', '_')
            root.mkdir()
            if name in VARIANTS: (root/'images').symlink_to(Path(folder)/'images')
            found = special[name](root, args.n, rng) if name in special else variant(name, VARIANTS[name], root, args.n, rng)
            shutil.rmtree(root)
            return found
        counts = each(args.only or [*VARIANTS, *special], count)
    kills = {k: v for k, v in counts.items() if k != 'locks'}
    ways = {w: sum(v.get(w, 0) for v in kills.values()) for w in {w: 0 for v in kills.values() for w in v}}
    print(f'{sum(ways.values())} kills, all bit-equal: {ways}; {time.monotonic() - start:.0f} s')
    note(args.out, 'kills', dict(ways=ways, variants={k: sum(v.values()) for k, v in kills.items()}, locks=counts.get('locks')))

if __name__ == '__main__': main()

"""Disks that are too small: whatever cannot be written costs one sentence at most, and with room again the same command ends as if nothing had been.

    python tests/disks.py [--n 12] [--out nbs/results/integrity.json]

Three ways: operating calls that fail from the k-th on (or once), file systems of a few kilobytes (where one may mount), a limit on the size of a file."""
import ctypes, errno, os, resource, shutil, subprocess, tempfile
from contextlib import contextmanager
from pathlib import Path

from kills import arguments, at_operation, each, ended, fork, images, note, results_of
from lift_nb.cli import main as lift_nb

def command(*words):
    "A job: the command line, which must end with 0"
    def job():
        if (code := lift_nb([str(w) for w in words])): os._exit(code)
    return job

def train(place, *words): return command('train', place.parent/'images', *'-b tiny_clip -m lp --mda plain --epochs 2 --batch_size 16 --expand 0 --device cpu --save_steps 1'.split(),
    '--features', place/'features', '--output_dir', place/'run', *words)

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def failing(job, folder, first:int, times:int):
    "A job in which operations that write fail: `times` of them, from the `first` on"
    def act(k, event, args):
        nonlocal count
        if event == 'open' and not (args[2] or 0) & WRITES or event not in ('open', 'os.mkdir', 'os.rename'): return
        count += 1
        if first <= count < first + times: raise OSError(errno.ENOSPC, 'No space left on device', str(args[0]))
    count = 0
    def disturbed(): at_operation(folder, act); job()
    return disturbed

def writes(job, folder)->int:
    "Operations that write, in an undisturbed job"
    log, count = folder.parent/f'{folder.name}.count', [0]
    def counted():
        def act(k, event, args): count[0] += event in ('os.mkdir', 'os.rename') or event == 'open' and bool((args[2] or 0) & WRITES)
        at_operation(folder, act); job(); log.write_text(str(count[0]))
    said = folder.parent/f'{folder.name}.said'
    assert ended(fork(counted, said), 300) == 0, said.read_text()
    return int(log.read_text())

def small_files(job, size:int):
    "A job that can write files of so many bytes"
    def disturbed(): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])); job()
    return disturbed

def listened(job)->tuple: # exit code, output
    "Carry out a job whose output goes through a pipe, where no limit is reached"
    reader, writer = os.pipe()
    pid = fork(job, writer)
    os.close(writer)
    code = ended(pid, 300)
    os.set_blocking(reader, False)
    with open(reader, encoding='utf-8', errors='replace') as f: return code, f.read() or ''

def checked(job, what:str)->int: # exit code
    "Carry out a disturbed job: 0 or 2, and with 2 exactly one line of error"
    code, text = listened(job)
    errors = [l for l in text.splitlines() if l.startswith('lift_nb: ')]
    assert code in (0, 2) and 'Traceback' not in text and len(errors) == (code == 2), f'{what}: exit code {code}\n{text}'
    return code

def again(job, place, right, what):
    "With room: the command goes on and ends with the same"
    code, text = listened(job)
    assert code == 0, f'{what}, with room: {text}'
    found = results_of(place/'run')
    odd = {k for k in {**right, **found} if found.get(k) != right.get(k) and k != 'files'}
    needed = {*right['files']} - {'per_class.png', 'report', 'tensorboard'} # what is told, and can be made again
    assert not odd and needed <= {*found['files']} and not [f for f in found['files'] if f.endswith('.part')], f"{what}: {sorted(odd)} {found['files']}"

def spread(first:int, last:int, n:int): # at most n numbers, both ends among them
    return sorted({round(first + (last-first)*i/max(1, n-1)) for i in range(n)})

def calls(root, right, total, n)->dict:
    "Calls fail from the k-th on, or once"
    counts = dict(tried=0, refused=0)
    for times in 10**9, 1:
        for k in spread(1, total, n):
            shutil.rmtree(root/'x', ignore_errors=True); (root/'x').mkdir()
            what, job = f'{"all" if times > 1 else "one"} from write {k} of {total}', train(root/'x', '--resume', 'True')
            counts['refused'] += checked(failing(job, root/'x', k, times), what) == 2
            again(job, root/'x', right, what)
            counts['tried'] += 1
    return counts

def limits(root, right, sizes)->dict:
    "No file larger than a limit"
    counts = dict(tried=0, refused=0)
    for size in sizes:
        shutil.rmtree(root/'x', ignore_errors=True); (root/'x').mkdir()
        job = train(root/'x', '--resume', 'True')
        counts['refused'] += checked(small_files(job, size), f'files of {size} bytes') == 2
        again(job, root/'x', right, f'files of {size} bytes')
        counts['tried'] += 1
    return counts

@contextmanager
def file_system(place:Path, size:int):
    "A file system of so many kilobytes; None where this may not be"
    place.mkdir(exist_ok=True)
    ok = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', place], capture_output=True).returncode == 0
    try: yield place if ok else None
    finally: ok and subprocess.run(['umount', '-l', place], check=True)

def file_systems(root, right, sizes)->dict:
    "A real file system that fills"
    counts = dict(tried=0, refused=0)
    for size in sizes:
        shutil.rmtree(root/'x', ignore_errors=True)
        with file_system(root/'x', size) as place:
            if place is None: return dict(skipped='needs the right to mount')
            job, what = train(root/'x', '--resume', 'True'), f'a file system of {size} kB'
            counts['refused'] += checked(job, what) == 2
            subprocess.run(['mount', '-o', 'remount,size=64m', place], check=True)
            again(job, root/'x', right, what)
            counts['tried'] += 1
    return counts

def own_memory(options):
    "Give this process a /dev/shm of its own"
    libc, flags, words = ctypes.CDLL(None), int(options == 'ro'), None if options == 'ro' else options.encode()
    if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None) or libc.mount(b'tmpfs', b'/dev/shm', b'tmpfs', flags, words): os._exit(77)

def shared_memory(root)->dict:
    "/dev/shm of 64 kB, of nothing, and read-only: image workers say so in one sentence, without them it goes on"
    counts = dict(tried=0, refused=0)
    for options in ('size=64k', 'size=4k', 'ro', 'size=2m'):
        def alone():
            own_memory(options)
            train(root/'x', '--num_workers', '2', '--mda', 'convex', '--resolution', '224')()
        shutil.rmtree(root/'x', ignore_errors=True); (root/'x').mkdir()
        if ended(fork(lambda: own_memory(options)), 60) == 77: return dict(skipped='needs a mount namespace')
        counts['refused'] += checked(alone, f'/dev/shm {options}') == 2
        def without(): own_memory(options); train(root/'x')()
        assert checked(without, f'/dev/shm {options}, no workers') == 0
        counts['tried'] += 1
    return counts

def other_commands(root, n)->dict:
    "predict, report, export and sweep on a disk that fills"
    (root/'y').mkdir()
    assert ended(fork(train(root/'y'), root/'said'), 300) == 0
    model, x = root/'y/run', root/'x'
    jobs = dict(predict=command('predict', model, root/'images/a', '--out', x/'p.csv', '--device', 'cpu'), report=command('report', model, '--out', x/'report'),
        export=command('export', model, '--format', 'timm', '--out', x/'m.safetensors'), data=command('data', root/'images'),
        sweep=command('sweep', root/'images', *'-b tiny_clip -m lp --mda plain --epochs 1 --batch_size 16 --expand 0 --device cpu --lr 0.01,0.02'.split(), '--output_dir', x/'all'))
    counts = dict(tried=0, refused=0)
    for name, job in jobs.items():
        def fresh(): shutil.rmtree(x, ignore_errors=True); x.mkdir()
        fresh(); total = writes(job, x)
        for times in 10**9, 1:
            for k in spread(1, total, n) if total else ():
                fresh()
                counts['refused'] += checked(failing(job, x, k, times), f'{name}, write {k} of {total}') == 2
                code, text = listened(job)
                assert code == 0, f'{name}, with room after write {k}: {text}'
                counts['tried'] += 1
        print(f'{name}: {total} writes', flush=True)
    return counts

def main(argv=None):
    what = 'calls, limits, file systems, shared memory, other commands'
    args = arguments(__doc__, what, n=(12, 'points at which a disk is full, in each way')).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images(root/'images'); (root/'whole').mkdir()
        total = writes(train(root/'whole'), root/'whole')
        right, largest = results_of(root/'whole/run'), sum(f.stat().st_size for f in (root/'whole').rglob('*') if f.is_file())
        ways = {'calls': lambda: calls(root, right, total, args.n), 'limits': lambda: limits(root, right, spread(1, largest//2, args.n)),
            'file systems': lambda: file_systems(root, right, spread(4, largest//1000, args.n)), 'shared memory': lambda: shared_memory(root),
            'other commands': lambda: other_commands(root, max(2, args.n//3))}
        note(args.out, 'disks', each(args.only or ways, lambda name: ways[name]()))

if __name__ == '__main__': main()

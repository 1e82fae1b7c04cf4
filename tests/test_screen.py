"What is seen in a terminal, in a pipe, after Ctrl-C, and with names that would command a terminal"
import json, os, re, select, shlex, subprocess, sys, time
from pathlib import Path
import pytest
import numpy as np
from PIL import Image

pty = pytest.importorskip('pty')
fcntl, termios = pytest.importorskip('fcntl'), pytest.importorskip('termios')
root = Path(__file__).parents[1]
LIFT_NB, RUN = [sys.executable, '-m', 'lift_nb'], 'train digits_lt --method lp --loss ce --epochs 2 --device cpu --output_dir out'.split()
ESCAPES = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')

def environment(**more):
    "That of a person: no tests, no width of its own"
    unwanted = 'COLUMNS', 'LINES', 'IN_TEST', 'LIFT_NB_PROGRESS', 'NO_COLOR', 'FORCE_COLOR', 'TTY_COMPATIBLE'
    kept = {k: v for k, v in os.environ.items() if k not in unwanted}
    return {**kept, 'TERM': 'xterm-256color', 'PYTHONPATH': str(root), 'PYTHONIOENCODING': 'utf-8', **more}

def in_terminal(words, cwd, columns=80, interrupt_at=None, **env): # Ctrl-C is typed when this text has appeared
    "What a command writes to a terminal of so many columns, and its exit code"
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe(words[0], words, environment(**env))
    fcntl.ioctl(fd, termios.TIOCSWINSZ, np.array([50, columns, 0, 0], np.uint16).tobytes())
    said, end = b'', time.monotonic() + 300
    while time.monotonic() < end:
        if not select.select([fd], [], [], 1)[0]: continue
        try: part = os.read(fd, 1 << 16)
        except OSError: break # its end on Linux
        if not part: break
        said += part
        if interrupt_at and re.search(interrupt_at, said.decode(errors='replace')): interrupt_at = os.write(fd, b'\x03') and None
    return said.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def piped(words, cwd, **env): return subprocess.run(words, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)

def widest(said): # of the lines that hold no path
    return max(len(l) for l in re.split(r'[\r\n]+', ESCAPES.sub('', said)) if '/' not in l.replace('1/2', '').replace('2/2', ''))

@pytest.mark.parametrize('columns, colours', [(80, {}), (120, dict(NO_COLOR='1'))], ids=['80', '120 without colours'])
def test_in_a_terminal(columns, colours, tmp_path):
    said, code = in_terminal([*LIFT_NB, *RUN], tmp_path, columns, **colours)
    assert not colours or not re.search(r'\x1b\[(3[0-8]|4[0-8]|9\d)[;m]', said)
    assert code == 0 and widest(said) <= columns, said
    assert re.search(r'training .*\d+ %.* left', said) and 'testing' in said and '\x1b[1m' in said # a bar, bold titles
    plain = ESCAPES.sub('', said)
    for part in ('digits_lt: lp with loss ce, epochs 2', '10 classes (1 many, 4 medium, 5 few)', 'CPU, ', 'fp32', ' 2/2 ', '95 % CI', 'weakest', 'Results: '): assert part in plain, part
    assert re.search(r'trained +[\d,]+ of [\d,]+ parameters \([\d.]+ %\)', plain) and '{' not in plain
    log = (tmp_path/'out/log.txt').read_text()
    settings = json.loads(log.splitlines()[1].split('; ', 1)[1])
    assert settings['loss'] == 'ce' and re.search(r'^epoch 2/2  train_loss [\d.]+  valid_loss [\d.]+  overall [\d.]+', log, re.M) and '\x1b' not in log

def test_in_a_pipe(tmp_path):
    done = piped([*LIFT_NB, *RUN], tmp_path)
    assert done.returncode == 0 and '\x1b' not in done.stdout + done.stderr and '\r' not in done.stdout and widest(done.stdout) <= 80, done.stdout + done.stderr
    table = [l for l in done.stdout.splitlines() if re.match(r'  (epoch|\d/2) ', l)]
    assert len(table) == 3 and len({*map(len, table)}) == 1, table # aligned
    assert not [l for l in done.stdout.splitlines() if l != l.rstrip()]
    again = piped([*LIFT_NB, *RUN, '--resume', 'True'], tmp_path, COLUMNS='60', PYTHONIOENCODING='ascii')
    assert again.returncode == 0 and again.stdout.isascii() and 'was finished before' in again.stdout and 'Results: ' in again.stdout

def test_ascii(tmp_path):
    for words in (['--help'], ['train', '--help'], ['env']):
        done = piped([*LIFT_NB, *words], tmp_path, PYTHONIOENCODING='ascii')
        assert done.returncode == 0 and done.stdout.strip(), (words, done.stderr)
        assert done.stdout.isascii() or '--help' in words # click writes its help in UTF-8 nevertheless

def test_a_reader_that_has_seen_enough(tmp_path):
    done = subprocess.run(f'{shlex.join([*LIFT_NB, *RUN])} | head -3', shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout.count('\n') == 3 and done.stderr == '', done.stderr

def test_interrupted_and_resumed(tmp_path):
    "Ctrl-C prints the very command that goes on"
    words = [*(w.replace('2', '30') if w == '2' else w for w in RUN), '--validate', 'False']
    said, code = in_terminal([*LIFT_NB, *words], tmp_path, interrupt_at=r' 2/30 ')
    plain = ESCAPES.sub('', said)
    assert code == 130 and 'Traceback' not in plain and re.search(r'Stopped in epoch \d+ of 30', plain), plain
    command = plain.split('go on with')[1].split('\n')[1].split()
    assert command == ['python', '-m', 'lift_nb', *words, '--resume', 'True']
    done = piped([sys.executable, *command[1:]], tmp_path)
    assert done.returncode == 0 and 'Going on in epoch' in done.stdout and '  30/30 ' in done.stdout and '  1/30 ' not in done.stdout, done.stdout

def test_names_that_command_a_terminal(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path/'images'
    for c in ('\x1b[31mred', 'a\x1b]0;title\x07', '\u202eright', 'plain'):
        (folder/c).mkdir(parents=True)
        for i in range(5): Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder/c/f'\x1b[2J{i}.png')
    for words in (['data', 'images'], [*'train images --backbone tiny_clip --method lp --epochs 1 --output_dir done'.split()], ['predict', 'done', 'images'],
                  ['predict', 'done', 'images', 'nowhere\x1b[31m']):
        said, code = in_terminal([*LIFT_NB, *words], tmp_path)
        assert code == (2 if 'nowhere\x1b[31m' in words else 0), said
        assert not re.search('\x1b\\[31mred|\x1b\\]|\x07|\u202e|\x1b\\[2J|nowhere\x1b', said), words
        assert words[:1] != ['predict'] or code or '\\x1b[2J0.png' in said, said
    assert '\x1b' not in (tmp_path/'done/log.txt').read_text()

@pytest.mark.parametrize('given, policy', [({}, 'PASSIVE'), (dict(OMP_WAIT_POLICY='ACTIVE'), 'ACTIVE')])
def test_waiting_threads_leave_the_core(given, policy, tmp_path):
    "What the user has set stays"
    env = {k: v for k, v in environment(**given).items() if k != 'OMP_WAIT_POLICY' or given}
    code = 'import lift_nb, os, sys; print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.split() == [policy, 'False']

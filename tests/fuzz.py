"""Run the fuzz tests at a larger size, and count the inputs that were tried.

    python tests/fuzz.py [--times 5] [--out nbs/results/integrity.json]

Every input ended right or in one `LiftError`; anything else would have failed the test."""
import os, re, subprocess, sys
from pathlib import Path

from kills import arguments, each, note

TESTS = { # what is fuzzed → tests
    'words of the command line': 'test_fuzz.py::test_options test_fuzz.py::test_bare_words test_fuzz.py::test_commands',
    'saved models, damaged': 'test_fuzz.py::test_arbitrary_bytes test_fuzz.py::test_damaged_files test_fuzz.py::test_headers_of_others',
    'saved models, changed and sealed again': 'test_fuzz.py::test_sealed_descriptions test_fuzz.py::test_sealed_tensors test_fuzz.py::test_put_back',
    "the original's checkpoints": 'test_fuzz.py::test_damaged_pickles test_fuzz.py::test_original_checkpoints_of_anything',
    'weights renamed or left out': 'test_backbones.py::test_renamed_and_omitted',
    'checkpoints of a training': 'test_resume.py::test_damaged_checkpoints',
    'tables': 'test_folders.py::test_random_tables', 'folders': 'test_folders.py::test_random_folders',
    'images of odd modes, formats and shapes': 'test_pixels.py::test_odd_images_from_files'}

def tried(tests:str, times:float)->int:
    "Run tests; raises `SystemExit` with their output when one fails"
    here = Path(__file__).parent
    words = [sys.executable, '-m', 'pytest', '-q', '-n', '0', '--hypothesis-show-statistics', *(str(here/t) for t in tests.split())]
    done = subprocess.run(words, env={**os.environ, 'FUZZ': str(times)}, capture_output=True, text=True, cwd=here.parent)
    if done.returncode: sys.exit(done.stdout[-6000:])
    return sum(int(n) + int(bad) for n, bad in re.findall(r'(\d+) passing(?: examples?)?, (\d+) failing', done.stdout))

def main(argv=None):
    args = arguments(__doc__, ', '.join(TESTS), times=(5., 'times as many inputs as in the ordinary tests')).parse_args(argv)
    note(args.out, 'fuzzed', each(args.only or TESTS, lambda name: tried(TESTS[name], args.times)))

if __name__ == '__main__': main()

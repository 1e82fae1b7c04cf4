"What a reader of the site sees, in Chromium: skipped where the site is not built (`python .ci/docs.py`) or Chromium or Playwright is missing"
import pytest
import site_check
from notebooks import root

site = root/'_docs'
try: import playwright
except ImportError: playwright = None
pytestmark = pytest.mark.skipif(not (site/'index.html').exists() or not site_check.chromium() or not playwright,
                                reason='needs _docs, Chromium and Playwright')
pages = 'index.html', 'learner.html', 'cli.html', 'experiments/recipe.html', 'explanations/glossary.html', 'reproductions/cifar100_lt.html'

@pytest.fixture(scope='module')
def seen(): return site_check.report(site, pages)

def test_pages_are_whole_and_readable(seen): assert not seen[0]

def test_search_finds_what_people_ask(seen): assert not seen[1]

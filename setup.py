"The package's metadata, read from settings.ini (nbdev's one place for it)"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
statuses = ['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']
status = int(cfg['status'])
docs = cfg['doc_host'] + cfg['doc_baseurl']
pythons = [f'Programming Language :: Python :: 3.{n}' for n in range(int(cfg['min_python'].split('.')[1]), 14)]
assert cfg['license'] == 'apache2', 'setup.py names the Apache licence'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    project_urls={'Documentation': docs, 'Source': cfg['git_url'], 'Issues': f"{cfg['git_url']}/issues", 'Changelog': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    packages=find_packages(include=['lift_nb', 'lift_nb.*']), package_data={'lift_nb': ['weights/*.safetensors', 'evaluation/*.html', 'py.typed']},
    include_package_data=False, zip_safe=False, python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require={e: cfg[f'{e}_requirements'].split() for e in ('dev', 'ray', 'export', 'labels', 'demo')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=[f'Development Status :: {status} - {statuses[status-1]}', f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3', *pythons, 'Typing :: Typed',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Topic :: Scientific/Engineering :: Image Recognition'])

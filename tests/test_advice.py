"Advice: what the counts, the class names and the frozen features say, at both doors"
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest, timm, torch
from PIL import Image

from lift_nb.cli import main
from lift_nb.core.errors import LiftError
from lift_nb.data.dataset import digits_lt, from_arrays
from lift_nb.experiments.advice import _Advice, _Facts, _about_blocks, _other_settings, _rules_of, _try_starts, _typed_command, advise
from lift_nb.models.backbones import create_backbone
from lift_nb.learner import lift_plus_learner
from lift_nb.experiments.recipe import resolve

def named(names, n=(30, 8, 3)):
    x, y = np.zeros((sum(n), 8, 8, 3), np.uint8), np.repeat(np.arange(len(n)), n)
    return from_arrays(x, y, x[:6], np.repeat(np.arange(len(n)), 2), names, 'some')

def test_it_is_a_recipe():
    a = advise('digits_lt')
    assert a.settings['init'] in a.facts.starts and resolve(data='digits_lt', **a.settings).epochs == a.settings['epochs']
    low, high = a.expected()
    assert max(a.facts.starts.values()) <= low < high < 100

def test_training_images_only():
    data = digits_lt()
    other = from_arrays(data.train_images, data.train_labels, data.test_images[::-1]//2, data.test_labels, data.class_names, data.name)
    assert advise(data, 'tiny_clip').facts.starts == advise(other, 'tiny_clip').facts.starts

def test_starts_are_compared_on_the_same_classes(): # those with two images
    rng, text = np.random.default_rng(0), torch.eye(30)
    y = torch.cat([torch.arange(5).repeat_interleave(20), torch.arange(5, 30)])
    f = torch.from_numpy(rng.normal(size=(len(y), 30))).float()*.1 + text[y]
    f[y > 4] = -text[y[y > 4]] # the text is wrong about each single image
    assert _try_starts(f, y, text) == dict(semantic=100., class_mean=100., lda=100.)
    assert _try_starts(f[y > 4], y[y > 4] - 5, text[5:]) == dict(semantic=0.)

def test_the_command_trains_what_was_advised():
    a = advise('digits_lt', create_backbone('tiny_clip'))
    facts = replace(a.facts, recipe=resolve(data='digits_lt', backbone='clip_vit_b16'))
    assert '--backbone clip_vit_b16' in _typed_command(_Advice(facts, dict(backbone='clip_vit_b16', epochs=5), {})) # digits_lt has another of its own

def test_a_ready_network_stays_as_it_is():
    b = create_backbone('tiny_clip')
    advise('digits_lt', b)
    learn = lift_plus_learner('digits_lt', b, method='lp', epochs=1, num_workers=0)
    with pytest.raises(LiftError, match='carries what was trained'): learn.report('nowhere', check_data=True)

def test_zero_shot_has_no_settings_to_try(): assert _other_settings(_Facts(digits_lt(), resolve(data='digits_lt', method='zs'), {}, chosen=True)) is None

def test_groups_are_a_caution():
    facts = _Facts(digits_lt(), replace(resolve(data='digits_lt'), group_by='x'), dict(lda=60.), chosen=True)
    assert 'Groups are not held apart' in str(_Advice(facts, dict(lr=.1), dict(lr='')))
    assert 'Groups' not in str(advise('digits_lt'))

def test_names_decide_without_a_backbone():
    assert advise(named(['cat', 'dog', 'owl'])).settings['backbone'] == 'clip_vit_b16'
    assert advise(named(['n01', 'n02', 'n03'])).settings['init'] == 'lda'
    assert advise(named(['cat', 'dog', 'owl'], (9, 9, 9))).settings['loss'] == 'ce'

def test_wider_inside_a_layer_scale():
    def settings(**blocks): return {k: v for k, (v, _) in _rules_of(_Facts(digits_lt(), resolve(data='digits_lt'), dict(lda=60.), chosen=True, **blocks)).items()}
    wide = settings(n_blocks=12, layer_scale=True)
    assert (wide['dim'], wide['lr'], wide['head_lr']) == (64, .003125, .05) and resolve(data='digits_lt', **wide).dim == 64
    assert not {'dim', 'lr', 'head_lr'} & {*settings(n_blocks=12), *settings(n_blocks=0, layer_scale=False)}
    net = timm.create_model('vit_tiny_patch16_224', init_values=.1, depth=2, num_classes=0, img_size=32)
    assert _about_blocks(SimpleNamespace(model=net), 10) == dict(n_blocks=2, layer_scale=True)
    assert _about_blocks(SimpleNamespace(model=timm.create_model('resnet18', num_classes=0)), 10) == dict(n_blocks=0)

def test_shell(tmp_path, capsys):
    for c, n in dict(cat=8, dog=3).items():
        (tmp_path/'im'/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path/'im'/c/f'{i}.png')
    assert main(['advise', str(tmp_path/'im'), '--backbone', 'tiny_clip', '--features', str(tmp_path/'f')]) == 0
    said = capsys.readouterr().out
    assert 'class_mean' in said and 'Try: lift_nb train' in said and [*(tmp_path/'f').iterdir()]

@pytest.mark.parametrize('words, says', [(['advise'], 'takes one folder'), (['advise', 'nowhere'], 'nowhere'),
    (['advise', 'digits_lt', '--backbone', 'tiny_clp'], 'tiny_clp'), (['advise', 'digits_lt', '--epochs', '3'], 'epochs')])
def test_mistakes(words, says, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1

def test_mistakes_in_python():
    with pytest.raises(LiftError, match='Unknown setting'): advise('digits_lt', colour='red')

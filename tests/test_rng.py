import random

import numpy as np
import torch

from adasam_hf import rng


def draw():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def test_replay_draws_the_same_and_leaves_no_trace():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    state = rng.capture()
    first = draw()
    middle = rng.capture()
    with rng.replay(state):
        assert draw() == first
        draw()
    after = draw()
    assert after != first
    with rng.replay(middle):
        assert draw() == after


def test_replay_resumes_after_an_exception():
    state = rng.capture()
    draw()
    here = rng.capture()
    try:
        with rng.replay(state):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = draw()
    with rng.replay(here):
        assert draw() == after

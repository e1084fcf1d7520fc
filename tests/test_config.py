"""Configurations at random: each is refused by an error that names one of its fields, or trains."""
import math
import random
from dataclasses import fields

import pytest

from symbreak.config import Config
from symbreak.train import train

NAMES = [field.name for field in fields(Config)]
VALUES = (None, True, False, 0, 1, 2, 3, 7, -1, 10 ** 30, 10 ** 400, 2 ** 31, 2 ** 40, 1.5, 0.01, -0.5, math.nan,
          math.inf, 1e300, 1e-320, "", "x", "identical", "he", "cpu", "auto", [], {}, (1,), b"x")
SMALL = dict(train_size=64, test_size=32, epochs=1, width=1, depth=7, batch_size=32)


@pytest.mark.parametrize("seed", range(3))
def test_a_configuration_is_refused_by_name_or_trains(seed):
    draw, refused, trained = random.Random(seed), 0, 0
    for _ in range(200):
        changes = {name: draw.choice(VALUES) for name in draw.sample(NAMES, draw.choice((1, 1, 2, 3)))}
        try:
            config = Config(**SMALL | changes)
            if max(config.epochs, config.width, config.depth - 7, config.threads - 1) > 2 or config.compile: continue
            if config.processes > 1: continue  # seconds each: `tests/test_processes.py` has them
            assert math.isfinite(train(config).history.test_accuracy[0])
            trained += 1
        except ValueError as e:
            assert any(name in str(e) for name in (*NAMES, "source")), (changes, e)
            refused += 1
    assert refused > 100 and trained > 5

"""A checkpoint with an altered file is refused in one clear sentence, or is as if it had not been altered.

CATS_ADVERSARIAL_SEED=1 runs other cases; ``python -m tests.adversarial files`` more of them.
"""

from __future__ import annotations

import os

import pytest
from adversarial.harness import altered_files, mutations
from adversarial.harness.checkpoints import equal, load_config_door, load_transformers_door, make_checkpoints

CASES = 400
SEED = int(os.environ.get("CATS_ADVERSARIAL_SEED", 0))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_altered_files(checkpoints, tmp_path):
    altered_files.run(CASES, SEED, checkpoints, tmp_path / "altered").check()


def test_unaltered_files_are_accepted(checkpoints):
    """What is compared is the same for the same files, through both doors, and differs for other thresholds."""
    for base in checkpoints.by_rule.values():
        assert equal(load_config_door(base.directory, base.model), base.expected)
        assert equal(load_transformers_door(base.directory), base.expected)
    assert not equal(checkpoints.by_rule["searched"].expected, checkpoints.by_rule["two_threshold"].expected)


def test_every_mutation_alters_something(checkpoints, tmp_path):
    """Whatever a mutation does, some of its cases leave other bytes than the checkpoint had."""
    import random

    base = checkpoints.by_rule["searched"]
    original = {path.name: path.read_bytes() for path in base.directory.iterdir()}
    for mutation in {*mutations.DAMAGE, *mutations.OF_A_CHECKPOINT} - {mutations.not_a_file}:
        for n in range(5):
            base.copy_to(tmp_path / "altered")
            mutation(random.Random(n), tmp_path / "altered", checkpoints)
            altered = {path.name: path.read_bytes() for path in (tmp_path / "altered").iterdir() if path.is_file()}
            if altered != original:
                break
        else:
            raise AssertionError(mutation.__name__)

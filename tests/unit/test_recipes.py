"""Settings of training recipes that do not go together, each refused in one line."""

import pytest

from genray.config import load_config
from genray.errors import ConfigError

L = "base_learners.linf"
REFUSED = {
    "selective decay of nothing": (
        [f"{L}.optimizer={{name: adam, decay_norms_and_biases: false}}"],
        f"{L}.optimizer.decay_norms_and_biases: has no effect without weight_decay",
    ),
    "clip to nothing": (
        [f"{L}.optimizer.clip_norm=0"],
        f"{L}.optimizer.clip_norm: expected a number above 0, got 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    overrides, line = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert str(error.value).removeprefix("configuration: ").strip() == line

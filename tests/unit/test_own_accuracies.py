"""evaluation.base_learners: metrics.jsonl has each learner's own accuracy on what checkpoints are chosen on."""

import json

import pytest
import torch

import genray
from genray.config import load_config
from genray.run.setup import prepare

SHORT = ["training.epochs=2", "data.train_examples=300", "data.test_examples=20", "data.validation_examples=60"]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test"])
def test_the_last_epoch_has_the_accuracy_of_the_models_that_are_left(tmp_path, split):
    overrides = [*SHORT, "evaluation.base_learners=true", f"evaluation.select_on={split}"]
    genray.train(None, overrides, runtime="local", storage=str(tmp_path), name="own")
    images = prepare(load_config(None, overrides)).splits[split]
    x = images.images.float() / 255
    record = json.loads((tmp_path / "own" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("natural", "linf"):
        model = genray.load_model(tmp_path / "own" / "learners" / f"{name}.pt")
        with torch.no_grad():
            right = (model(x).argmax(1) == images.labels).double().mean()
        found = record["learners"][name]
        assert found[f"{split}_natural"] == pytest.approx(float(right), abs=1e-9)
        assert found[f"{split}_natural"] >= found[f"{split}_pgd20"] >= 0

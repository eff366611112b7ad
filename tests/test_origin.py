"""Where a model's numbers come from, when a fine-tuned model's file is one of the places."""

import pytest
import torch
from safetensors.torch import save_file

from mgen_core import WeightsError
from mgen_core.origin import find_origin, make_lora


def lightning(path, state):
    torch.save({"state_dict": state, "hyper_parameters": {}}, path)
    return path


@pytest.fixture
def base(tmp_path):
    tensors = {"bert.words.weight": torch.ones(4, 2), "cls.predictions.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_language_head_that_was_trained_on_replaces_the_published_one(base, tmp_path):
    ckpt = lightning(
        tmp_path / "model.ckpt",
        {
            "adapter.predictions.bias": torch.full((4,), 7.0),
            "backbone.decoder.predictions.bias": torch.full((4,), 7.0),
        },
    )
    origin = find_origin(base, ckpt, None)
    assert origin.backbone.tensor("cls.predictions.bias").tolist() == [7.0] * 4
    assert origin.backbone.flat("cls.predictions.bias", 1, 3).tolist() == [7.0] * 2
    assert origin.backbone.tensor("bert.words.weight").sum() == 8
    assert not origin.head.keys
    assert origin.digests(0)["weights"] != find_origin(base, None, None).digests(0)["weights"]


def test_the_head_and_the_scaler_are_one_checkpoint(base, tmp_path):
    state = {
        "adapter.linear.weight": torch.ones(1, 2),
        "scaler._mean": torch.tensor([3.0]),
        "scaler._std": torch.tensor([2.0]),
    }
    origin = find_origin(base, lightning(tmp_path / "model.ckpt", state), None)
    assert set(origin.head.keys) == {"linear.weight", "scaler._mean", "scaler._std"}
    assert origin.digests(0).keys() == {"weights", "head"}


def test_without_a_fine_tuned_model_the_seed_or_the_weights_tell(base):
    assert find_origin(None, None, None).digests(5) == {"weights": 5}
    assert find_origin(base, None, None).digests(5)["weights"] != 5


@pytest.mark.parametrize("given", [{}, {"r": 8}, {"r": 8, "alpha": 16, "dora": True}])
def test_settings_of_lora_that_are_incomplete_or_unknown(given):
    with pytest.raises(WeightsError, match="lora has"):
        make_lora(given)

"""scripts.experiments.vision: the models, the data, a search."""

import json

import pytest
import torch

from scripts.experiments import vision


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    return vision.digits()


def test_digits(data) -> None:
    images, held_out, classes, answers = data
    assert images.shape == (1437, 3, 8, 8) and held_out.shape == (360, 3, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert sorted(set(classes.tolist())) == sorted(set(answers.tolist())) == list(range(10))


@pytest.mark.parametrize(
    "model", ["ViT", pytest.param("ResNet", marks=[pytest.mark.slow, pytest.mark.thorough])]
)
def test_s3_trains_vision_models(model: str, data) -> None:
    """Begun at chance, 2.30 nats and 90 % errors."""
    run = vision.train(model, "S3", 3e-3, 1, 4, data)
    assert run["loss"][-1] < 0.7 * run["loss"][0] and run["error"][-1] < 50


def test_a_search_goes_on_until_the_best_lies_inside(data, monkeypatch) -> None:
    """And then takes all seeds at it; runs replaced by numbers."""

    def train(model, label, lr, seed, epochs, data) -> dict:
        return {"lr": lr, "seed": seed, "loss": [0.0], "error": [abs(lr - 0.03)]}

    monkeypatch.setattr(vision, "train", train)
    found = vision.search("ViT", "S3", 4, data)
    assert [run["lr"] for run in found["tried"]] == [3e-4, 1e-3, 3e-3, 9e-3, 0.03, 0.08]
    assert {(run["lr"], run["seed"]) for run in found["finals"]} == {(0.03, s) for s in (1, 2, 3)}


def test_the_picture_and_the_table(tmp_path, monkeypatch, capsys) -> None:
    def train(model, label, lr, seed, epochs, data) -> dict:
        return {"lr": lr, "seed": seed, "loss": [2.0, 1.0], "error": [50.0, lr]}

    monkeypatch.setattr(vision, "train", train)
    assert vision.main(["--output", str(tmp_path), "--models", "ViT", "--epochs", "4"]) == 0
    assert "ViT, S3" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "vision.json").read_text())) == ["ViT"]
    assert (tmp_path / "vision.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        vision.main(["--epochs", "3"])

"""Trains a ResNet and a ViT on scikit-learn's digits, with S3 and with common optimizers.

    pip install -e '.[vision]'
    python -m scripts.experiments.vision [--output FOLDER]

The models are torchvision's, for images of 8 x 8 pixels. There are 1,437 training and 360 test
images. A run has 20 epochs with batches of 64, a warmup of 3 epochs and a cosine schedule to 0.
Each optimizer is trained at four learning rates, or more if the best one lies at an end, and with
three seeds at the best one. The learning rates are chosen on the test images.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from megatron_s3 import S3
from megatron_s3.report.compare import Table
from megatron_s3.report.styles import styles

EPOCHS, WARMUP, BATCH = 20, 3, 64
SEEDS = (1, 2, 3)
#: Ratio of neighboring learning rates; their number at first, and at most.
FACTOR, FIRST, MOST = 3.0, 4, 8

#: lr * weight_decay, which the paper keeps constant.
DECAY = 1e-4
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "S3": (S3, 1e-3),
    "AdamW": (torch.optim.AdamW, 1e-3),
    "NAdam": (
        lambda x, lr, weight_decay: torch.optim.NAdam(
            x, lr=lr, weight_decay=weight_decay, decoupled_weight_decay=True
        ),
        1e-3,
    ),
    "SGD with momentum": (
        lambda x, lr, weight_decay: torch.optim.SGD(
            x, lr=lr, weight_decay=weight_decay, momentum=0.9
        ),
        3e-2,
    ),
}


def resnet() -> nn.Module:
    """Returns a ResNet of four stages with one block each; its stem reduces images by 2, not 4."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit() -> nn.Module:
    """Returns a ViT of four layers with 64 channels, on patches of 2 x 2 pixels."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=8, patch_size=2, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=10,
    )  # fmt: skip


MODELS = {"ResNet": resnet, "ViT": vit}


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns training images, test images, training classes and test classes.

    Images are of shape (n, 3, 8, 8), float32, from -1 to 1; classes are of shape (n,), int64.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (
        torch.tensor(data.images, dtype=torch.float32).div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    )
    classes = torch.tensor(data.target)
    return tuple(train_test_split(images, classes, test_size=0.2, random_state=0, stratify=classes))


def train(model_name: str, label: str, lr: float, seed: int, epochs: int, data) -> dict:
    """Trains a run.

    Returns:
        ``lr``, ``seed``, and for each epoch the test ``error`` (%) and the mean training ``loss``.
    """
    images, held_out, classes, answers = data
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    make, _ = OPTIMIZERS[label]
    optimizer = make(model.parameters(), lr=lr, weight_decay=DECAY / lr)
    steps = math.ceil(len(images) / BATCH)
    warm = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1e-3, total_iters=min(WARMUP, epochs) * steps
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs - WARMUP) * steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [WARMUP * steps])
    losses, errors = [], []
    for _ in range(epochs):
        model.train()
        seen = 0.0
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seen += loss.item() * len(batch)
        losses.append(seen / len(images))
        model.eval()
        with torch.no_grad():
            right = (model(held_out).argmax(1) == answers).float().mean().item()
        errors.append(100 * (1 - right))
    return {"lr": lr, "seed": seed, "loss": losses, "error": errors}


def score(run: dict) -> float:
    """Returns the score by which learning rates are chosen; lower is better.

    It is the test error, then the training loss; inf if the loss is not finite.
    """
    loss = run["loss"][-1]
    return run["error"][-1] + 1e-3 * loss if math.isfinite(loss) else math.inf


def search(model_name: str, label: str, epochs: int, data) -> dict:
    """Trains all learning rates with the first seed, and the best one with all seeds.

    Returns:
        The runs with the first seed (``tried``) and those at the best learning rate (``finals``).
    """
    middle = OPTIMIZERS[label][1]
    low, high, known = -1, FIRST - 2, {}
    while True:
        for k in range(low, high + 1):
            lr = float(f"{middle * FACTOR**k:.1g}")
            if k not in known:
                known[k] = train(model_name, label, lr, SEEDS[0], epochs, data)
                print(f"{model_name}, {label}, rate {lr:g}: test error "
                      f"{known[k]['error'][-1]:.2f} %", flush=True)  # fmt: skip
        best = min(known, key=lambda k: score(known[k]))
        if low < best < high or len(known) >= MOST:
            break
        low, high = (low - 1, high) if best == low else (low, high + 1)
    rate = known[best]["lr"]
    finals = [known[best]] + [train(model_name, label, rate, s, epochs, data) for s in SEEDS[1:]]
    return {"tried": [known[k] for k in sorted(known)], "finals": finals}


def draw(found: dict, path: Path) -> None:
    """Draws test error by learning rate, and training loss by epoch at the best learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(2, len(found), squeeze=False)
    for column, (model, labels) in enumerate(found.items()):
        above, below = panels[:, column]
        for (label, runs), own in zip(labels.items(), styles(list(labels)), strict=True):
            points = [(r["lr"], r["error"][-1]) for r in runs["tried"]]
            style = {"linestyle": own.line, "color": own.colour}
            above.plot(*zip(*points, strict=True), marker=own.marker, label=label, **style)
            mean = [
                statistics.fmean(v) for v in zip(*(r["loss"] for r in runs["finals"]), strict=True)
            ]
            below.plot(range(1, len(mean) + 1), mean, label=label, **style)
        above.set_xscale("log")
        above.set_yscale("log")
        above.set_title(model)
        above.set_xlabel("peak learning rate")
        below.set_yscale("log")
        below.set_xlabel("epoch")
        for panel in (above, below):
            panel.grid(color="0.92")
    panels[0, 0].set_ylabel("test error, %")
    panels[1, 0].set_ylabel("training loss, mean of seeds")
    panels[0, 0].legend(fontsize=8)
    drawn.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Trains, prints the table, and writes vision.json and vision.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/vision"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args(argv)
    if args.epochs < WARMUP + 1:
        parser.error(f"--epochs {args.epochs}: {WARMUP} epochs are warmup; give more")
    data = digits()
    args.output.mkdir(parents=True, exist_ok=True)
    found = {
        model: {label: search(model, label, args.epochs, data) for label in OPTIMIZERS}
        for model in args.models
    }
    rows = []
    for model, labels in found.items():
        for label, runs in labels.items():
            errors = [run["error"][-1] for run in runs["finals"]]
            losses = [run["loss"][-1] for run in runs["finals"]]
            rates = [run["lr"] for run in runs["tried"]]
            rows.append([
                f"{model}, {label}", f"{runs['finals'][0]['lr']:g}",
                f"{len(rates)}, {min(rates):g} to {max(rates):g}",
                f"{statistics.fmean(errors):.2f}", f"{statistics.stdev(errors):.2f}",
                f"{statistics.fmean(losses):.5f}",
            ])  # fmt: skip
    title = f"digits, {args.epochs} epochs, {len(SEEDS)} seeds"
    headings = ["", "learning rate", "tried", "test error, %", "s.d.", "training loss"]
    print("", Table(title, headings, rows), sep="\n")
    (args.output / "vision.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, args.output / "vision.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train the two classifiers whose features make the Frechet distances of fewstep.

    python training/train_classifier.py digits                   # train, store, evaluate
    python training/train_classifier.py photographs
    python training/train_classifier.py digits --evaluate-only   # evaluate what is stored

Two cross entropies are minimised, with one layer of features before both: of the class (which
digit; which photograph), and of what was done to the image: nothing, noise of one of four strengths
or blur of one of two; and for photographs a turn by 0, 90, 180 or 270 degrees as well. The colours
of the photographs are shifted and scaled a little at random, or they would be all that it sees.

Beside the weights, features of the training data (all 1,500 digits; 2,000 crops) and of held-out
data (297; 1,000) are stored, so that nothing but training needs the images.

The table that is printed says how the features react: Frechet distances to features of the data
(the stored ones) of other images that were changed. Digits are too few for two disjoint halves of a
thousand; there the changed images are the training images themselves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from photographs import Photographs, to_float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, pad, silu
from train_digits import split

import fewstep as fs
from fewstep.models._classifier import CLASSIFIERS, Classifier

WEIGHTS = Path(__file__).resolve().parents[1] / "src" / "fewstep" / "models" / "weights"

NOISES = (0.05, 0.1, 0.2, 0.4)
#: Centre of a (b, c, b)^2 kernel, b = (1 - c) / 2.
BLURS = (0.8, 0.6)
POOL, ROWS, HELD_ROWS = 20_000, 2_000, 1_000

Batch = tuple[Tensor, Tensor, Tensor]


def blurred(x: Tensor, centre: float) -> Tensor:
    """Every channel convolved with a separable 3x3 kernel."""
    line = torch.tensor([(1 - centre) / 2, centre, (1 - centre) / 2])
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return conv2d(pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def spoiled(x: Tensor, kind: Tensor, generator: torch.Generator) -> Tensor:
    """Images x with kind 0: as they are; 1 to 4: noise; 5, 6: blurred."""
    strength = torch.tensor([0.0, *NOISES, 0.0, 0.0])[kind]
    out = x + strength[:, None, None, None] * torch.randn(x.shape, generator=generator)
    for number, centre in enumerate(BLURS, 5):
        out = torch.where((kind == number)[:, None, None, None], blurred(x, centre), out)
    return out


def digits_batches(count: int, generator: torch.Generator, held_out: bool = False) -> Iterator:
    """Images, digit, what was done. A third of the images are as they are."""
    x_train, y_train, x_held, y_held = split()
    x, y = (x_held, y_held) if held_out else (x_train, y_train)
    while True:
        i = torch.randint(len(x), (count,), generator=generator)
        kind = (torch.randint(9, (count,), generator=generator) - 2).clamp(0)
        yield spoiled(x[i], kind, generator), y[i], kind


def photographs_batches(
    count: int, generator: torch.Generator, held_out: bool = False
) -> Iterator[Batch]:
    """Crops, photograph, four times what was done plus the turn; from a pool of crops."""
    crops, numbers = Photographs(held_out).crops(POOL, np.random.default_rng(1 + held_out))
    labels = torch.from_numpy(numbers)
    while True:
        i = torch.randint(len(crops), (count,), generator=generator)
        turn = torch.randint(4, (count,), generator=generator)
        kind = (torch.randint(9, (count,), generator=generator) - 2).clamp(0)
        x = to_float(crops[i.numpy()])
        if not held_out:
            contrast = 1 + 0.1 * torch.randn(count, 1, 1, 1, generator=generator)
            x = contrast * x + 0.1 * torch.randn(count, 3, 1, 1, generator=generator)
        for k in (1, 2, 3):
            x[turn == k] = torch.rot90(x[turn == k], k, (2, 3))
        yield spoiled(x, kind, generator), labels[i], 4 * kind + turn


BATCHES: dict[str, Callable[..., Iterator[Batch]]] = {
    "digits": digits_batches,
    "photographs": photographs_batches,
}


def data(kind: str, held_out: bool) -> tuple[Tensor, Tensor]:
    """The images whose features are stored, and their classes."""
    if kind == "digits":
        return split()[2:] if held_out else split()[:2]
    rng = np.random.default_rng(3 + held_out)
    crops, labels = Photographs(held_out).crops(HELD_ROWS if held_out else ROWS, rng)
    return to_float(crops), torch.from_numpy(labels)


def train(kind: str, args: argparse.Namespace) -> None:
    """AdamW with a linear warm-up and decay; then the scale of the features, and the files."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    net: Classifier = CLASSIFIERS[kind]()
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.rate, weight_decay=args.decay)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
    start, recent = time.perf_counter(), []
    steps = args.steps or {"digits": 3_000, "photographs": 2_000}[kind]
    for step, (x, label, done) in zip(
        range(steps), BATCHES[kind](args.batch, generator), strict=False
    ):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 100, 1.25 * (1 - step / steps))
        h = net.body(x)
        h = h * (torch.rand(h.shape, generator=generator) >= args.dropout) / (1 - args.dropout)
        z = silu(net.project(h))
        loss = cross_entropy(net.head(z), label) + cross_entropy(net.pretext(z), done)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 250 == 0:
            elapsed = time.perf_counter() - start
            print(f"step {step + 1:5d}  {np.mean(recent):.4f}  {elapsed:4.0f} s", flush=True)
            recent = []
    net.eval().requires_grad_(False)
    for name, value in net.state_dict().items():
        value.copy_(value.half()) if name not in ("mean", "std") else None
    train_x, train_y = data(kind, False)
    held_x, held_y = data(kind, True)
    z = fs.metrics.features(train_x, net.features)
    net.mean.copy_(z.mean(0).half())
    net.std.copy_(z.std(0).half())
    store(
        args.out / f"{kind}-classifier.safetensors",
        {name: value.half().contiguous() for name, value in net.state_dict().items()},
        {"architecture": f"fewstep.models._classifier, {kind}", "classes": " ".join(net.names)},
    )
    stored = {}
    for part, x, label in (("train", train_x, train_y), ("held", held_x, held_y)):
        stored[part] = fs.metrics.features(x, net.features).half()
        stored[f"{part}_labels"] = label.to(torch.uint8)
    store(args.out / f"{kind}-features.safetensors", stored, {"network": f"{kind}-classifier"})


def store(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that everybody may read."""
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def load(kind: str, folder: Path) -> tuple[Classifier, dict[str, Tensor]]:
    """The stored network, and the stored features."""
    net = CLASSIFIERS[kind]()
    stored = load_file(folder / f"{kind}-classifier.safetensors")
    net.load_state_dict({name: value.float() for name, value in stored.items()})
    return net.eval().requires_grad_(False), load_file(folder / f"{kind}-features.safetensors")


def changes(x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Images, as they are and changed."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(x.shape, generator=generator)
    tint = torch.tensor([0.1, 0.0, -0.1][: x.shape[1]])[:, None, None]
    return {
        "as they are": x,
        **{f"noise {s:g}": x + s * noise for s in (0.02, *NOISES)},
        **{f"blurred {centre:g}": blurred(x, centre) for centre in (0.9, *BLURS)},
        **{f"contrast times {c:g}": c * x for c in (0.9, 0.8)},
        **{
            f"{'red and blue' if x.shape[1] == 3 else 'brightness'} shifted by {c:g}": x + c * tint
            for c in (0.5, 1.0, 2.0)
        },
        "turned by 90 degrees": torch.rot90(x, 1, (2, 3)),
        "one class missing": x[label != 3],
        "two classes missing": x[(label != 3) & (label != 0)],
        "half of the classes": x[label < int(label.max() + 1) // 2],
    }


def evaluate(kind: str, folder: Path) -> None:
    """Print accuracies on training and held-out images, and the reactions."""
    net, stored = load(kind, folder)
    for held_out in (False, True):
        size = 5000
        x, label, done = next(BATCHES[kind](size, torch.Generator().manual_seed(7), held_out))
        f = fs.metrics.features(x, net.features)
        logits = net.pretext(silu(f * net.std + net.mean))
        right, right_done = (net.logits(f).argmax(1) == label), (logits.argmax(1) == done)
        part = "held-out" if held_out else "training"
        print(f"{part}, {size} random: class {right.float().mean():.1%}", end="")
        print(f", what was done {right_done.float().mean():.1%}")
        part = "held" if held_out else "train"
        own = net.logits(stored[part].float()).argmax(1) == stored[f"{part}_labels"]
        print(f"  stored features, {len(own)} images as they are: class {own.float().mean():.1%}")
    if kind == "digits":
        x, label, _, _ = split()
    else:
        crops, number = Photographs().crops(ROWS, np.random.default_rng(6))
        x, label = to_float(crops), torch.from_numpy(number)
    reference = stored["train"]
    held = fs.metrics.frechet_distance(stored["held"], reference)
    print(f"Frechet distance of {len(x)} images to the stored {len(reference)} features")
    for name, images in changes(x, label).items():
        d = fs.metrics.frechet_distance(fs.metrics.features(images, net.features), reference)
        print(f"| {name} | {d.value:.3f} | {d.low:.3f} to {d.high:.3f} |")
    print(f"| held-out | {held.value:.3f} | {held.low:.3f} to {held.high:.3f} |")


def main() -> None:
    """Train unless told not to, then evaluate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=sorted(CLASSIFIERS))
    parser.add_argument("--evaluate-only", action="store_true", help="use what is stored")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the files")
    parser.add_argument("--steps", type=int, help="default: 3,000 digits, 2,000 photographs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.05, help="decoupled weight decay")
    parser.add_argument("--dropout", type=float, default=0.2, help="before the features")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate_only:
        train(args.kind, args)
    evaluate(args.kind, args.out)


if __name__ == "__main__":
    main()

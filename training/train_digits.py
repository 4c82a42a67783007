"""Train and evaluate the digits model that ships with fewstep.

    python training/train_digits.py                   # train, store the weights, evaluate
    python training/train_digits.py --evaluate-only   # evaluate the stored weights

Data x = pixels / 8 - 1, shape (1, 8, 8). Process x_t = x + sigma n, n ~ N(0, I). The network F is
preconditioned and trained as in EDM (Karras et al., 2022, https://arxiv.org/abs/2206.00364,
section 5 and table 1):

    D(x; sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4),
    loss        = E | F(c_in x_t, log(sigma) / 4) - (x - c_skip x_t) / c_out |^2,

log(sigma) normal. The last is EDM's weighted loss written for F. Labels are replaced by 10 ("none")
at random, for classifier-free guidance. Of the 1,797 images 297 are held out. With so few images
the network memorises; strong dropout and a short training keep the held-out loss near its minimum.

Evaluation needs scikit-learn for the classifier that judges the samples.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC
from torch import Tensor

import fewstep as fs
from fewstep.models._digits import SIGMA_DATA, UNCONDITIONAL, DigitsNet

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "fewstep"
DATA = PACKAGE / "exact" / "data" / "digits.safetensors"
WEIGHTS = PACKAGE / "models" / "weights" / "digits.safetensors"

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
HELD_OUT = 297
# Euclidean distance below which a sample counts as a near copy of a training image.
NEAR = 1.0
SIGMAS_SHOWN = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)


def split(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1500, 1, 8, 8) and labels, held-out images (297, 1, 8, 8) and labels."""
    stored = load_file(DATA)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(stored["labels"])))
    images = (stored["images"][order].float() / 8 - 1)[:, None]
    labels = stored["labels"][order].long()
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def residual(net: DigitsNet, x: Tensor, label: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """F minus its target, of the shape of x (B, 1, 8, 8); sigma (B,)."""
    s = sigma[:, None, None, None]
    total = (s**2 + SIGMA_DATA**2).sqrt()
    c_in, c_skip, c_out = 1 / total, SIGMA_DATA**2 / total**2, s * SIGMA_DATA / total
    noisy = x + s * noise
    return net(c_in * noisy, sigma.log() / 4, label) - (x - c_skip * noisy) / c_out


@torch.no_grad()
def loss_table(net: DigitsNet, seed: int = 1) -> None:
    """Print the mean square of F minus its target per noise level, on both parts of the data.

    An ignorant model (F = 0) scores about 1; a gap between the columns is memorisation.
    """
    x_train, y_train, x_held, y_held = split()
    generator = torch.Generator().manual_seed(seed)
    print("  sigma     training    held-out")
    for sigma in SIGMAS_SHOWN:
        row = []
        for x, label in ((x_train, y_train), (x_held, y_held)):
            squares = []
            for _ in range(12):
                noise = torch.randn(x.shape, generator=generator)
                r = residual(net, x, label, torch.full((len(x),), sigma), noise)
                squares.append(r.square().mean())
            row.append(torch.stack(squares).mean().item())
        print(f"{sigma:7.2f}  {row[0]:11.4f} {row[1]:11.4f}")


def train(args: argparse.Namespace) -> None:
    """Train with Adam, cosine decay and an exponential moving average of the weights."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x_train, y_train, _, _ = split()
    net = DigitsNet(dropout=args.dropout)
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=args.decay
    )
    warmup = 500

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, data std {x_train.std():.4f}")
    start, recent = time.perf_counter(), 0.0
    for step in range(args.steps):
        chosen = torch.randint(len(x_train), (args.batch,), generator=generator)
        dropped = torch.rand(args.batch, generator=generator) < args.label_dropout
        label = torch.where(dropped, UNCONDITIONAL, y_train[chosen])
        log_sigma = args.p_mean + args.p_std * torch.randn(args.batch, generator=generator)
        sigma = log_sigma.exp().clamp(SIGMA_MIN, SIGMA_MAX)
        noise = torch.randn(args.batch, *x_train.shape[1:], generator=generator)
        loss = residual(net, x_train[chosen], label, sigma, noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        # A short memory at first, or the average would long carry the untrained weights.
        keep = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 1 - keep)
        recent += loss.item()
        if (step + 1) % 1000 == 0:
            elapsed = time.perf_counter() - start
            print(f"step {step + 1:6d}  loss {recent / 1000:.4f}  {elapsed:6.0f} s", flush=True)
            recent = 0.0
        if (step + 1) % 5000 == 0:
            loss_table(average)
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in average.state_dict().items()},
        args.weights,
        metadata={
            "architecture": "fewstep.models._digits.DigitsNet, default sizes",
            "process": f"alpha = 1, sigma = t, t in [{SIGMA_MIN:g}, {SIGMA_MAX:g}]",
            "prediction": "EDM preconditioning",
            "sigma_data": str(SIGMA_DATA),
            "data": "scikit-learn load_digits, images / 8 - 1, shape (1, 8, 8)",
            "label": f"0..9, {UNCONDITIONAL} = unconditional",
        },
    )
    print(f"{args.weights.name}: {args.weights.stat().st_size:,} bytes")


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to the pixels of a and b, (n, 64) each."""
    a, b = a.double(), b.double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # trace sqrt(Ca Cb) from the symmetric matrix sqrt(Ca) Cb sqrt(Ca).
    values, vectors = torch.linalg.eigh(ca)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def evaluate() -> None:
    """Judge the stored weights by a classifier, by distances, and by two moments of the pixels."""
    x_train, y_train, x_held, y_held = split()
    net = DigitsNet()
    net.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    print("mean square of F minus its target, stored weights:")
    loss_table(net.eval())

    train_flat, held_flat = x_train.flatten(1), x_held.flatten(1)
    classifier = SVC(C=10.0).fit(train_flat.numpy(), y_train.numpy())
    accuracy = classifier.score(held_flat.numpy(), y_held.numpy())
    held_nearest = torch.cdist(held_flat, train_flat).min(dim=1).values
    reference = held_nearest.median().item()
    print(f"classifier: {100 * accuracy:.1f} % right on the held-out images")
    print(
        f"held-out images: median distance to the nearest training image {reference:.3f}, "
        f"{100 * (held_nearest < NEAR).float().mean().item():.1f} % closer than {NEAR:g}, "
        f"pixel Frechet distance to the training images {frechet(held_flat, train_flat):.3f}"
    )

    denoiser = fs.models.load("digits")
    labels = torch.arange(10).repeat_interleave(100)
    print(f"   nfe  scale  agreement  nearest / held-out  closer than {NEAR:g}  pixel Frechet")
    for nfe in (20, 8, 6):
        for scale in (1.0, 1.5, 2.0):
            guided = fs.Guided(denoiser, scale=scale, uncond={"label": UNCONDITIONAL})
            x = fs.sample(
                guided,
                (len(labels), 1, 8, 8),
                nfe=nfe,
                seed=0,
                cond={"label": labels},
                progress=False,
            )
            # Judged at the 17 grey levels of the data, clipped to its range.
            flat = ((x.flatten(1).clamp(-1, 1) + 1) * 8).round() / 8 - 1
            agreement = (classifier.predict(flat.numpy()) == labels.numpy()).mean()
            nearest = torch.cdist(flat, train_flat).min(dim=1).values
            print(
                f"{nfe:6d}  {scale:5.1f}  {100 * agreement:7.1f} %  "
                f"{nearest.median().item() / reference:18.3f}  "
                f"{100 * (nearest < NEAR).float().mean().item():11.1f} %  "
                f"{frechet(flat, train_flat):13.3f}"
            )


def main() -> None:
    """Train unless told not to, then evaluate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--evaluate-only", action="store_true", help="use the stored weights")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where training stores them")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.05, help="decoupled weight decay")
    parser.add_argument("--ema", type=float, default=0.999, help="memory of the weight average")
    parser.add_argument("--dropout", type=float, default=0.4)
    parser.add_argument("--label-dropout", type=float, default=0.12)
    parser.add_argument("--p-mean", type=float, default=-0.8, help="mean of log(sigma)")
    parser.add_argument("--p-std", type=float, default=1.4, help="deviation of log(sigma)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate_only:
        train(args)
    evaluate()


if __name__ == "__main__":
    main()

"""Train the two photograph models that ship with fewstep.

    python training/train_patches.py edm              # train, store the weights, evaluate
    python training/train_patches.py flow
    python training/train_patches.py edm --evaluate-only

Data: crops (3, 32, 32) of six photographs (`photographs.py`), x = pixels / 127.5 - 1.

edm: x_t = x + sigma n, preconditioned and trained as in EDM (Karras et al., 2022,
https://arxiv.org/abs/2206.00364, section 5 and table 1), log(sigma) normal:

    loss = E | F(c_in x_t, log(sigma) / 4) - (x - c_skip x_t) / c_out |^2.

flow: x_t = (1 - t) x + t n, the velocity of the linear path (Lipman et al., 2022,
https://arxiv.org/abs/2210.02747), t the logistic function of a normal number (Esser et al., 2024,
https://arxiv.org/abs/2403.03206, section 3.1):

    loss = E | F(x_t, t) - (n - x) |^2.

The rate rises over 200 steps, stays, and falls linearly over the last 30 %. Noise levels of a batch
are spread evenly over their distribution (one per quantile). Weights in float32, products in
bfloat16. A run that is killed goes on from its checkpoint with the same numbers. The losses, on the
training part and on the held-out right-hand sides of the photographs, are kept in a CSV file and
drawn.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import numpy as np
import torch
from photographs import Photographs, to_float
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep as fs
from fewstep.models._patches import SIGMA_DATA, TIMES, PatchesNet

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "src" / "fewstep" / "models" / "weights"
DOCS = HERE.parent / "docs"

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
#: Noise levels of the loss table: sigma, and sigma / (1 + sigma) for t.
SIGMAS_SHOWN = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
COLUMNS = [
    "step",
    "seconds",
    "recent",
    *(f"{p} {s:g}" for p in ("train", "held") for s in SIGMAS_SHOWN),
]


def edm_residual(net: PatchesNet, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """F minus its target, of the shape of x; sigma (B,)."""
    s = sigma[:, None, None, None]
    total = (s**2 + SIGMA_DATA**2).sqrt()
    c_in, c_skip, c_out = 1 / total, SIGMA_DATA**2 / total**2, s * SIGMA_DATA / total
    noisy = x + s * noise
    return net(c_in * noisy, sigma.log() / 4).float() - (x - c_skip * noisy) / c_out


def flow_residual(net: PatchesNet, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """F minus the velocity, of the shape of x; t (B,)."""
    s = t[:, None, None, None]
    return net((1 - s) * x + s * noise, t).float() - (noise - x)


RESIDUALS = {"edm": edm_residual, "flow": flow_residual}


def levels(kind: str, normal: Tensor, args: argparse.Namespace) -> Tensor:
    """Noise levels from standard normal numbers."""
    if kind == "edm":
        return (args.p_mean + args.p_std * normal).exp().clamp(SIGMA_MIN, SIGMA_MAX)
    return torch.sigmoid(args.t_mean + args.t_std * normal)


def spread_normal(count: int, generator: torch.Generator) -> Tensor:
    """One standard normal number from each of `count` equally likely intervals."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


@torch.no_grad()
def losses(kind: str, net: PatchesNet, count: int = 512) -> list[float]:
    """Mean square of F minus its target per level, on both parts of the data, same noise always."""
    row = []
    for held_out in (False, True):
        x = to_float(Photographs(held_out).crops(count, np.random.default_rng(1))[0])
        generator = torch.Generator().manual_seed(1)
        for sigma in SIGMAS_SHOWN:
            noise = torch.randn(x.shape, generator=generator)
            level = torch.full((count,), sigma if kind == "edm" else sigma / (1 + sigma))
            row.append(RESIDUALS[kind](net, x, level, noise).square().mean().item())
    return row


def train(kind: str, args: argparse.Namespace) -> None:
    """AdamW, and an exponential moving average of the weights."""
    seed = args.seed + (kind == "flow")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    photographs = Photographs()
    rng = np.random.default_rng(seed)
    net = PatchesNet(TIMES[kind])
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=args.decay
    )
    begin, spent, rows = 0, 0.0, []
    checkpoint = args.checkpoint.with_name(f"{args.checkpoint.name}-{kind}.pt")
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(stored["net"])
        average.load_state_dict(stored["average"])
        optimizer.load_state_dict(stored["optimizer"])
        generator.set_state(stored["generator"])
        begin, spent, rows = stored["step"], stored["seconds"], stored["rows"]
        rng.bit_generator.state = stored["rng"]
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, from step {begin}", flush=True)
    start, recent = time.perf_counter() - spent, []
    for step in range(begin, args.steps):
        factor = min(1.0, (step + 1) / 200, (args.steps - step) / (0.3 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * factor
        x = to_float(photographs.crops(args.batch, rng)[0])
        level = levels(kind, spread_normal(args.batch, generator), args)
        noise = torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            r = RESIDUALS[kind](net, x, level, noise)
        loss = r.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        # A short memory at first, or the average would long carry the untrained weights.
        keep = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 1 - keep)
        recent.append(loss.item())
        done = step + 1
        if done % 500 == 0 or done == args.steps:
            spent = time.perf_counter() - start
            rows.append([done, spent, sum(recent) / len(recent), *losses(kind, average)])
            print(" ".join(f"{v:.4g}" for v in rows[-1]), flush=True)
            recent = []
            state = {
                "net": net.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "rng": rng.bit_generator.state,
                "step": done,
                "seconds": spent,
                "rows": rows,
            }
            part = checkpoint.with_suffix(".part")
            torch.save(state, part)
            part.replace(checkpoint)
    name = f"patches-{kind}"
    paths = {
        "edm": {
            "process": f"alpha = 1, sigma = t, t in [{SIGMA_MIN:g}, {SIGMA_MAX:g}]",
            "prediction": "EDM preconditioning",
            "sigma_data": str(SIGMA_DATA),
        },
        "flow": {"process": "alpha = 1 - t, sigma = t, t in [0, 1]", "prediction": "flow"},
    }
    save_file(
        {key: value.half().contiguous() for key, value in average.state_dict().items()},
        args.out / f"{name}.safetensors",
        metadata={
            "architecture": f"fewstep.models._patches.PatchesNet({TIMES[kind]:g})",
            **paths[kind],
            "data": "crops of photographs in scikit-image and scikit-learn, pixels / 127.5 - 1",
            "steps": str(args.steps),
            "batch": str(args.batch),
            "seed": str(seed),
        },
    )
    (args.out / f"{name}.safetensors").chmod(0o644)
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"{value:.5g}" for value in row] for row in rows)


def load(kind: str, folder: Path) -> PatchesNet:
    """The stored network."""
    net = PatchesNet(TIMES[kind])
    stored = load_file(folder / f"patches-{kind}.safetensors")
    net.load_state_dict({key: value.float() for key, value in stored.items()})
    return net.eval()


def picture(kind: str, to: Path) -> None:
    """Learning curves from the CSV file, beside samples of the stored model and training crops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (HERE / f"patches-{kind}.csv").open() as file:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    samples = fs.sample(
        fs.models.load(f"patches-{kind}"), (64, 3, 32, 32), nfe=20, seed=0, progress=False
    )
    data = to_float(Photographs().crops(64, np.random.default_rng(2))[0])
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), width_ratios=[1.3, 1, 1])
    steps = [row["step"] for row in table]
    for number, sigma in enumerate(SIGMAS_SHOWN):
        for part, style in (("train", "-"), ("held", ":")):
            axes[0].plot(
                steps,
                [row[f"{part} {sigma:g}"] for row in table],
                style,
                color=f"C{number}",
                label=f"sigma = {sigma:g}" if part == "train" else None,
            )
    axes[0].set(xlabel="step", ylabel="mean square of F minus its target", yscale="log")
    axes[0].set_title("solid: training crops; dotted: held-out", fontsize=10)
    axes[0].legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for axis, images, title in (
        (axes[1], samples, "64 samples, 20 evaluations, seed 0, not chosen"),
        (axes[2], data, "64 training crops"),
    ):
        grid = images.clamp(-1, 1).add(1).div(2).reshape(8, 8, 3, 32, 32)
        axis.imshow(grid.permute(0, 3, 1, 4, 2).reshape(256, 256, 3).numpy())
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(to, dpi=80)
    print(to)


def evaluate(kind: str, folder: Path, count: int = 1000) -> None:
    """Judge the stored weights: losses per noise level, features of samples, copies."""
    net = load(kind, folder)
    row = losses(kind, net, 2048)
    print("  sigma     training    held-out")
    for i, sigma in enumerate(SIGMAS_SHOWN):
        print(f"{sigma:7.2f}  {row[i]:11.4f} {row[i + len(SIGMAS_SHOWN)]:11.4f}")

    predicts = {"edm": (fs.EDM(), fs.edm(SIGMA_DATA)), "flow": (fs.Flow(), "flow")}[kind]
    model = fs.Denoiser(net, *predicts)
    features = fs.metrics.bundled_features("photographs")
    data = fs.models.data_features("photographs")
    known = to_float(Photographs().crops(20_000, np.random.default_rng(3))[0])
    fresh = to_float(Photographs().crops(count, np.random.default_rng(4))[0])
    held_out = to_float(Photographs(held_out=True).crops(count, np.random.default_rng(4))[0])
    print(f"{count} images         Frechet to the data    nearest of 20,000 training crops")

    def line(name: str, x: Tensor) -> None:
        distance = fs.metrics.frechet_distance(fs.metrics.features(x, features), data)
        nearest = torch.cdist(x.flatten(1), known.flatten(1)).min(dim=1).values / 3072**0.5
        print(f"{name:18s}  {distance!s:24s}  median {nearest.median().item():.3f}", flush=True)

    line("training crops", fresh)
    line("held-out crops", held_out)
    with torch.no_grad():
        for nfe in (5, 8, 20, 100):
            x = fs.sample(model, (count, 3, 32, 32), nfe=nfe, seed=0, progress=False)
            line(f"samples, NFE {nfe}", x)


def main() -> None:
    """Train unless told not to, then evaluate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=sorted(TIMES))
    parser.add_argument("--evaluate-only", action="store_true", help="use the stored weights")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument(
        "--picture", type=Path, help="draw learning curves and samples to this file"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("patches-checkpoint"))
    parser.add_argument("--steps", type=int, default=6_500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.01, help="decoupled weight decay")
    parser.add_argument("--ema", type=float, default=0.998, help="memory of the weight average")
    parser.add_argument("--p-mean", type=float, default=-0.6, help="mean of log(sigma)")
    parser.add_argument("--p-std", type=float, default=1.4, help="deviation of log(sigma)")
    parser.add_argument("--t-mean", type=float, default=0.0, help="mean of logit(t)")
    parser.add_argument("--t-std", type=float, default=1.3, help="deviation of logit(t)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate_only:
        train(args.kind, args)
    evaluate(args.kind, args.out)
    if args.picture is not None:
        picture(args.kind, args.picture)


if __name__ == "__main__":
    main()

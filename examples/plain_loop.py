"""One process and a plain PyTorch loop: `python examples/plain_loop.py [--checkpoint FILE]`.

The loop is yours: data, epochs, schedule, evaluation, checkpoints. PhiSAM owns one line of it, `opt.step(closure)`:
it runs the closure at n + 1 points, calls backward, and lets the base optimizer move the parameters. Here it is plain
SAM; put phisam.asam(), phisam.frobenius(), phisam.trace() in its place.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import phisam

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--checkpoint", type=Path, help="written after each epoch; the run goes on from it if it exists")
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pixels, digits = load_digits(return_X_y=True)  # 1,797 images of 8 x 8, from scikit-learn itself
inputs = torch.tensor(pixels / 16, dtype=torch.float32, device=device)
targets = torch.tensor(digits, device=device)
train, test = slice(0, 1437), slice(1437, None)  # the last ones were written by other people

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
model = model.to(device)
base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
opt = phisam.PhiSAM(model, base, measure=phisam.sam(), rho=phisam.schedules.warmup(0.05, steps=44))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)  # of `base` would be the same
start = 0
if args.checkpoint and args.checkpoint.exists():
    saved = torch.load(args.checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])  # the base optimizer's momentum, and the step, which all noise is a function of
    scheduler.load_state_dict(saved["scheduler"])
    start = saved["epoch"]

for epoch in range(start, args.epochs):
    model.train()
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(epoch)).to(device)
    for batch in order.split(128)[:-1]:  # the last one has 29 images only
        loss = opt.step(lambda batch=batch: nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
    scheduler.step()
    model.eval()  # dropout off, BatchNorm's running statistics on
    with torch.no_grad():
        correct = model(inputs[test]).argmax(1) == targets[test]
    print(f"epoch {epoch + 1:2}  last batch's loss {loss:.4f}  test accuracy {correct.float().mean():.4f}")
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
    if args.checkpoint:
        torch.save({**state, "epoch": epoch + 1}, args.checkpoint)
print(f"gradient evaluations a step {opt.gradient_evaluations_per_step:g}, skipped steps {opt.skipped_steps}")

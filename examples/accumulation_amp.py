"""Gradient accumulation and mixed precision: `python examples/accumulation_amp.py [--precision bf16|fp16|fp32]`.

A list of closures is one step on one large batch: every micro-batch is replayed at every point, and a point's loss is
the mean of theirs. In fp16 the GradScaler is PhiSAM's: it scales each point's loss, unscales once, skips and updates.
Call nothing of it yourself, except to save its state.
"""

import argparse
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import phisam

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
half = PRECISIONS[args.precision]

pixels, digits = load_digits(return_X_y=True)  # 1,797 images of 8 x 8, from scikit-learn itself
inputs = torch.tensor(pixels / 16, dtype=torch.float32, device=device)
targets = torch.tensor(digits, device=device)
train, test = slice(0, 1437), slice(1437, None)  # the last ones were written by other people

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)  # its parameters stay float32
base = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device.type) if args.precision == "fp16" else None
opt = phisam.PhiSAM(model, base, phisam.asam(), rho=0.5, max_grad_norm=1.0, grad_scaler=scaler)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=args.epochs)


def loss_of(examples: Tensor) -> Tensor:
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        outputs = model(inputs[examples])
    return nn.functional.cross_entropy(outputs.float(), targets[examples])  # a difference of losses needs float32


for epoch in range(args.epochs):
    model.train()
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(epoch)).to(device)
    for batch in order.split(128)[:-1]:
        micro_batches = batch.split(32)  # of one size: the mean of their losses is then the batch's
        # partial, not a lambda: all lambdas of a list would see the loop's last value.
        loss = opt.step([partial(loss_of, examples) for examples in micro_batches])
    scheduler.step()
    model.eval()
    with torch.no_grad():
        correct = model(inputs[test]).argmax(1) == targets[test]
    print(f"epoch {epoch + 1:2}  last batch's loss {loss:.4f}  test accuracy {correct.float().mean():.4f}")
scale = f", loss scale {scaler.get_scale():g}" if scaler else ""
print(f"{args.precision} on {device.type}: skipped steps {opt.skipped_steps}{scale}")

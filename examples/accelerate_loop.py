"""Hugging Face Accelerate: `python examples/accelerate_loop.py`, or with torchrun or `accelerate launch`.

Accelerate owns devices, process group, autocast, the split of the data and checkpoints; the loop is yours. Do not
`prepare` the optimizer: Accelerate's wrapper drops the loss and steps the GradScaler by itself, so the scaler is handed
to PhiSAM. `accelerator.backward`, `accumulate` and `clip_grad_norm_` have no part here: the closure only runs forward.
"""

import argparse
import gc

import torch
from accelerate import Accelerator, PartialState
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import phisam


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--checkpoint", help="folder that Accelerate saves to; load_state reads it")
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision=args.precision, cpu=not torch.cuda.is_available())

    pixels, digits = load_digits(return_X_y=True)  # 1,797 images of 8 x 8, from scikit-learn itself
    inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train = DataLoader(TensorDataset(inputs[:1437], targets[:1437]), batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(inputs[1437:], targets[1437:]), batch_size=64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    model, train, test = accelerator.prepare(model, train, test)
    # Accelerate gives each process other examples, so each is a data rank of its own: sample_parallel=1.
    mesh = phisam.sample_mesh(n_samples=1, sample_parallel=1)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = phisam.PhiSAM(model, base, phisam.sam(), rho=0.05, mesh=mesh, grad_scaler=accelerator.scaler)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
    accelerator.register_for_checkpointing(opt, scheduler)

    for _ in range(args.epochs):
        model.train()
        for x, y in train:
            loss = opt.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
        scheduler.step()
    opt.sync_buffers()  # BatchNorm's statistics are those of rank 0 until now
    if args.checkpoint:
        accelerator.save_state(args.checkpoint)
    model.eval()
    with torch.no_grad():
        correct = torch.cat([accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in test])
    accelerator.print(f"last batch's loss {loss:.4f}, test accuracy {correct.float().mean():.4f} of {len(correct)}")


main()
gc.collect()  # the model before its process group: gloo may abort at exit otherwise
PartialState().destroy_process_group()

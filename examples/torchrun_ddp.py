"""Many processes, no Ray: `torchrun --standalone --nproc-per-node 2 examples/torchrun_ddp.py [--checkpoint FILE]`.

torchrun starts the processes, DDP holds the replicas, the loop is yours. phisam deals the 4 points of a step to the
processes: with 2 each evaluates two points, with 4 each evaluates one, and a step is then about as long as an SGD step.
Ranks that share a data rank must see the same examples, so the sampler gets mesh.data_rank, not the process's rank.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import phisam


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", help="where rank 0 writes the trained model and the optimizer's state")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group(device_id=device if device.type == "cuda" else None)  # NCCL for GPUs, gloo for CPUs

    pixels, digits = load_digits(return_X_y=True)  # 1,797 images of 8 x 8: 1,437 to train on, 360 to test
    inputs, targets = torch.tensor(pixels / 16).float().to(device), torch.tensor(digits).to(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)  # closures call this, not model.module
    mesh = phisam.sample_mesh(n_samples=3)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = phisam.PhiSAM(model, base, measure=phisam.frobenius(), rho=0.01, lam=1e-3, n_samples=3, mesh=mesh)
    sampler = DistributedSampler(range(1437), num_replicas=mesh.data_size, rank=mesh.data_rank)
    loader = DataLoader(range(1437), batch_size=128 // mesh.data_size, sampler=sampler, drop_last=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=args.epochs * len(loader))

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = opt.step(lambda batch=batch: nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
            scheduler.step()
    opt.sync_buffers()  # BatchNorm's statistics are those of rank 0 until now
    model.eval()
    with torch.no_grad():
        accuracy = (model.module(inputs[1437:]).argmax(1) == targets[1437:]).float().mean()
    if dist.get_rank() == 0:
        print(f"data {mesh.data_size} x sample {mesh.sample_size}, loss {loss:.4f}, test accuracy {accuracy:.4f}")
        if args.checkpoint:  # every rank would load both
            torch.save({"model": model.module.state_dict(), "opt": opt.state_dict()}, args.checkpoint)


main()
gc.collect()  # the model before its process group: gloo may abort at exit otherwise
dist.destroy_process_group()

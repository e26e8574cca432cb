"""FSDP2, parameters sharded over the processes: `torchrun --standalone --nproc-per-node 2 examples/fsdp2.py`.

Shard the model first, build the base optimizer from the sharded parameters, and give PhiSAM a mesh with
sample_parallel=1: each forward gathers the parameters, so all processes must be at the same point together. No process
ever holds the whole v, and a step does not depend on how many processes there are.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import phisam


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", help="where rank 0 writes the whole trained model")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group(device_id=device if device.type == "cuda" else None)  # NCCL for GPUs, gloo for CPUs

    pixels, digits = load_digits(return_X_y=True)  # 1,797 images of 8 x 8: 1,437 to train on, 360 to test
    inputs, targets = torch.tensor(pixels / 16).float().to(device), torch.tensor(digits).to(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    for module in [*model[::2], model.to(device)]:
        fully_shard(module)
    mesh = phisam.sample_mesh(n_samples=2, sample_parallel=1)
    base = torch.optim.AdamW(model.parameters(), lr=5e-3)
    opt = phisam.PhiSAM(model, base, phisam.frobenius(), rho=0.01, lam=1e-3, n_samples=2, mesh=mesh)
    sampler = DistributedSampler(range(1437), num_replicas=mesh.data_size, rank=mesh.data_rank)
    loader = DataLoader(range(1437), batch_size=128 // mesh.data_size, sampler=sampler, drop_last=True)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = opt.step(lambda batch=batch: nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
    model.eval()
    with torch.no_grad():  # every process takes part: the forward gathers the parameters
        accuracy = (model(inputs[1437:]).argmax(1) == targets[1437:]).float().mean()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print(f"{mesh.data_size} processes, last batch's loss {loss:.4f}, test accuracy {accuracy:.4f}")
        if args.checkpoint:
            torch.save(whole, args.checkpoint)


main()
gc.collect()  # the model before its process group: gloo may abort at exit otherwise
dist.destroy_process_group()

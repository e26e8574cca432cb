"""phisam: (phi, psi, mu) sharpness-aware optimizers for PyTorch, from one process to many GPUs.

    import phisam
    opt = phisam.PhiSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), measure=phisam.frobenius(), rho=0.01)
    loss = opt.step(lambda: criterion(model(inputs), targets))

Read `reference.py` for the paper's algorithms as printed, then `measures.py`, `sharding.py` and `optimizer.py`.
"""

from phisam import diagnostics, schedules, sharpness
from phisam.catalogue import (
    asam,
    determinant,
    eigen_power,
    exp_product,
    frobenius,
    log_determinant,
    sam,
    sgd,
    ssam,
    trace,
)
from phisam.closures import Part
from phisam.measures import Measure
from phisam.noise import Noise, dirac, fisher_mask, gaussian, gradient_direction, hypercube, rademacher, sphere
from phisam.optimizer import PhiSAM
from phisam.record import StepRecord
from phisam.sharding import SampleMesh, sample_mesh, sample_size

__version__ = "0.1.0"

__all__ = [
    "Measure",
    "Noise",
    "Part",
    "PhiSAM",
    "SampleMesh",
    "StepRecord",
    "asam",
    "determinant",
    "diagnostics",
    "dirac",
    "eigen_power",
    "exp_product",
    "fisher_mask",
    "frobenius",
    "gaussian",
    "gradient_direction",
    "hypercube",
    "log_determinant",
    "rademacher",
    "sam",
    "sample_mesh",
    "sample_size",
    "schedules",
    "sgd",
    "sharpness",
    "sphere",
    "ssam",
    "trace",
]

"""Measuring the sharpness of a trained model: what its Hessian is, as numbers with standard errors.

    from phisam import sharpness
    hessian = sharpness.Hessian(model, torch.nn.CrossEntropyLoss(), [(inputs, targets), ...])
    print(sharpness.frobenius_squared(hessian), sharpness.top_eigenvalues(hessian, k=3).values)

Read `curvature.py` first (H through its products), then `norms.py`, `definition1.py`, `eigenvalues.py`, `spectrum.py`
and `ggn.py`. curvlinops (`pip install 'phisam[sharpness]'`) is imported when the first Hessian is made.
"""

from phisam.sharpness.curvature import GGN, Curvature, Hessian, Progress
from phisam.sharpness.definition1 import measure
from phisam.sharpness.eigenvalues import Eigenvalues, top_eigenvalues
from phisam.sharpness.estimate import Estimate
from phisam.sharpness.ggn import GGNSpectrum, ggn_log_determinant, ggn_spectrum
from phisam.sharpness.norms import frobenius_squared, trace, trace_and_frobenius
from phisam.sharpness.probes import probes_within
from phisam.sharpness.refusals import Unmeasurable
from phisam.sharpness.spectrum import Density, log_determinant, spectral_density

__all__ = [
    "GGN",
    "Curvature",
    "Density",
    "Eigenvalues",
    "Estimate",
    "GGNSpectrum",
    "Hessian",
    "Progress",
    "Unmeasurable",
    "frobenius_squared",
    "ggn_log_determinant",
    "ggn_spectrum",
    "log_determinant",
    "measure",
    "probes_within",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "trace_and_frobenius",
]

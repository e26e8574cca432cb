"""Pictures, as PNG and SVG: curves with bands over seeds, spectral densities, slices of the loss; Figures 1 and 2.

style.py        colours, lines and sizes; how a picture is written
curves.py       a metric against epochs, a band over seeds
density.py      the spectrum of a Hessian
slices.py       the loss along one direction, or over a plane as contours and as a surface
figure1.py      the runs of the paper's Figure 1; reproduce.py trains them, figure1_pictures.py draws them
figure2.py      the paper's Figure 2
landscape.py    what `phisam landscape` does: points of a slice, resumable, on any number of workers
"""

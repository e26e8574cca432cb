"""Sharpness as a service: in training, and of any model that a run left. `phisam.sharpness` is what measures.

config.py       what to measure: the section `sharpness:` of a run description, and the command's arguments
measuring.py    a model, examples and that section -> estimates, in one process or in a group of them
training.py     the same in an epoch of a run
command.py      what `phisam sharpness` does; on_ray.py: its workers
pictures.py     estimates and spectra as pictures and CSV, logged to the run
"""

"""Sweeps: a file and the results of its trials decide everything that follows, so a sweep can be replayed and resumed.

config.py       the sweep file
space.py        dimensions, conditions, which settings there are
trials.py       a setting -> a run description
variety.py      what trials differ in beside what is searched: workers, data
search.py       which setting is tried next
stopping.py     which trials are cut (asha, median); population.py: which go on from another's weights
preview.py      what `--dry-run` says
begun.py        sweeps that were begun here
run.py          from the file to the winner: prepare.py, driver.py, conclusion.py
"""

"""Chaos: faults from a seed over a running training and a running sweep, and whether anything was lost.

python -m ray_jobs.faults --faults 100 --seed 0

schedule.py     seed -> which fault, after how many steps
injectors.py    name -> function that does it to real processes and files
subject.py      a `phisam train` or `phisam sweep` with an MLflow server, begun, resumed, looked at
verdict.py      what the undisturbed and the disturbed runs left -> lost, twice, equal: pure
campaign.py     rounds of a disturbed run beside one undisturbed, until all faults are spent
"""

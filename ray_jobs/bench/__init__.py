"""`phisam bench`: what a step costs on this machine, beside the limit and beside other packages.

    workloads.py   a network, a batch, a loss
    methods.py     the steps that are compared: SGD, PhiSAM, and their peers
    cell.py        one network on so many workers: what is measured of it, in which order
    timing.py      clocks, turns, medians
    counting.py    memory and collectives of a step, as torch's profiler and allocator see them
    breakdown.py   where a step's time goes
    report.py      the tables, the CSV file, the plot
    first_step.py  seconds from the command `phisam train` to its first epoch
    command.py     what the command line asks for, run in processes of their own

How the numbers are made, and what each column means: docs/speed.md. Nothing here is imported by training.
"""

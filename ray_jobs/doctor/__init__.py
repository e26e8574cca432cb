"""`phisam doctor`: whether a cluster can do what a run will ask of it, before a GPU is spent.

findings.py   numbers in, verdicts out: no Ray, no file, no clock
here.py       what this machine can tell: its token, and how it reaches the cluster
probe.py      what the cluster's nodes tell: versions, storage, clocks, memory
allreduce.py  gradients' way between them: NCCL or gloo, and how fast
run.py        who is asked, and where
"""

"""Ray Jobs: a run is sent to a cluster, looked at from afar, and stopped.

token.py      the cluster's secret, in one file of mode 600
address.py    which cluster, and at what address
client.py     the cluster's HTTP interface: the only module that knows its paths
package.py    what travels with a job
submit.py     an asked-for command -> a package -> a job
driver.py     the job itself, on the cluster
heartbeat.py  where the driver leaves word of its place
status.py     what is told of a job: from its own state and the heartbeat, never from its output
logs.py       its output, however often the stream breaks
local.py      a cluster of this machine

The modules that a person waits for at a terminal import neither ray, torch nor mlflow.
"""

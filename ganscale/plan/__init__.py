"""What a config means on a cluster of any size, computed on one machine without the cluster.

`reading` counts what ranks and nodes read, `networks` what the networks weigh and what ranks tell
each other; `planning` holds both against the cluster, and `sections` are the pages of the result.
"""

"""What a run means on a cluster of any size, computed on one machine.

`planning.make_plan` is the entry point; `sections` defines the printed table.
"""

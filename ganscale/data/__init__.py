"""From shards to batches.

`manifest` lists the samples of a data set, `order` says which of them comes at which position of a
run, `shard_reader` reads their bytes, `images` decodes them, and `loader` makes batches of them.
"""

"""Images, from shards to finished batches.

`manifest` lists the samples of a data set, and `order` says which of them stands where in a run.
`store` reads the bytes of one sample, `decoding` makes pixels of them, and `loader` batches.
"""

"""Images, from a folder of files to shards on a disk, and from shards to finished batches.

`writing` makes shards of the images of `sources`, each in an `encoding`. `indexing` reads what is
inside one shard, and `manifest` describes a folder of them. `store` reads the bytes of one sample,
and `decoding` makes pixels of them.
"""

"""Data sets, from files to shards with a manifest: what happens before a run.

`writing` makes shards of the images of `sources`, each in an `encoding`. `indexing` reads what is
inside one shard, and `building` makes the manifest of a folder of them.
"""

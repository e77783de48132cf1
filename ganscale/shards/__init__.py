"""Data sets, from image files to shards with a manifest: the steps before a run.

`writing` makes shards from the images of `sources`, with the classes of `source_classes`, stored as
`encoding` says. `indexing` makes the manifest of existing shards: `listing` finds them,
`shard_index` reads one through `tar_reader`, and `index_cache` keeps the results and combines them.
Both read labels with `class_labels`. `verifying` compares shards with their manifest, `exclusions`
are lists of samples to leave out, and `interop` reads and writes the indices of other tools.
"""

"""Data sets, from files to shards with a manifest: what happens before a run.

`writing` makes shards of the images of `sources`, each in an `encoding`. `building` makes the
manifest of the shards that a `listing` finds: `indexing` reads what is inside one, through `tar`,
`finished` keeps it, and `merging` puts all together. `verifying` compares shards with their
manifest, `leaving_out` holds lists of what is bad, and `interchange` knows other tools' indices.
"""

"""A process that reads shards through a cache: FOLDER CAPACITY_BYTES BASE_URL SHARDS_JSON [hold].

Prints a line for each shard: its name, and whether its bytes have the SHA-256 that its name says.
With `hold`, it keeps the last one open until its standard input ends.
"""

import hashlib
import json
import os
import sys

from ganscale.data.manifest import Shard
from ganscale.data.remote.shard_cache import ShardCache


def main() -> None:
    folder, capacity, base, shards, *hold = sys.argv[1:]
    cache = ShardCache(folder, int(capacity), retry_seconds=20, stall_seconds=5)
    for each in json.loads(shards):
        shard = Shard(**each)
        copy = cache.open(f"{base}/{shard.name}", shard)
        digest = hashlib.sha256(os.pread(copy.descriptor, shard.bytes + 1, 0)).hexdigest()
        print(shard.name, digest == shard.name.removesuffix(".tar"), flush=True)
    if hold:
        sys.stdin.read()


if __name__ == "__main__":
    main()

"""Shards without a manifest, streamed as WebDataset streams them."""

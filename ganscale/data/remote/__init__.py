"""Shards in object stores, on web servers or behind a command, and their copies on local disk."""

"""What a generator makes: samples, and (in time) how good they are."""

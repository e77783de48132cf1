"""What may end a run from outside: requests to stop, ranks that die or hang; and who is told."""

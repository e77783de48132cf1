"""What ends a run from outside: requests to stop, and ranks that die, fail or hang."""

"""Injects faults into runs and checks what is left of them."""

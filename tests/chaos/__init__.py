"""Faults that take long, or that break servers of a stack of their own."""

"""Benchmarks. Each starts its own stack, compares contenders in alternating rounds of one run, prints medians and
ratios and writes them to `bench/results/`. Figures of one machine mean little; the ratios are what to look at.
"""

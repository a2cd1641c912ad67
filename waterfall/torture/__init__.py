"""A whole Waterfall on this machine, under mixed load, with a fault every few seconds; then its books are held against it.

`plan` draws the faults from a seed, `world` runs everything, `calls` and `people` are the load, `faults` does the harm,
`check` compares what was seen from outside with journal and chain, `run` puts it together.
"""

"""Whether one dial holds: mixed requests, 64 at once, under a given memory, watched from outside.

Each dial gets a process of its own with a model of random weights; the parent reads what the whole device has in use
all the while. Dials that --out holds for the same commit are kept. Before the dials, --calibrate runs single steps of
each kind and holds what they take against what was predicted. --dial none runs the mix twice without a dial, the second
time beside a process that takes nearly all that is free and leaves it again, turn by turn: the pool must make way, and
no answer may change.
Usage: python -m benchmarks.dials --dial 16GiB --dial 24GiB --seconds 120 --calibrate 60 --out FILE
"""

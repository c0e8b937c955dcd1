"""What peftcli costs, measured side by side with what else could do the same.

    make bench                                       # everything; docs/benchmarks.md says how long that takes
    python -m scripts.bench methods memory           # some parts
    python -m scripts.bench --smoke                  # as little as there can be: does it measure?

A part is a module of this package with a function `run(options) -> list[Table]`, named in `__main__.PARTS`. What is
compared runs in one call, in turns (`timing.interleaved`, `timing.processes`), since a shared machine's speed drifts:
what counts is the ratio. A part measures and says what it measured; it asserts nothing about speed.
"""

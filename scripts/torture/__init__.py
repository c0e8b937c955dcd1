"""What breaks runs on purpose, again and again, and counts what did not survive: `python -m scripts.torture`.

One module a part. A part does `count` of its kind and returns an `Outcome`; a test runs each with a small count.
"""

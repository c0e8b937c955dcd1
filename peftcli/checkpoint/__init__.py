"""What a run writes to be loaded again: adapters in PEFT's format, and the state that a resumed run needs."""

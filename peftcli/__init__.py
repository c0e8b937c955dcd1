"""peftcli: parameter-efficient fine-tuning from a YAML recipe."""

__version__ = "0.1.0"

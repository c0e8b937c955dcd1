"""Merges that are compared as whole models."""

from peftcli.run.merging import merge


def merge_and_compare(subject, target, dtype, reporter, *, overwrite=False):
    """Returns how well the whole models agree, and how many weights were merged."""
    done = merge(subject, target, dtype, reporter, overwrite=overwrite, verify="logits")
    return done.agreement, done.count

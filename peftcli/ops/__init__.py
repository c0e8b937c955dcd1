"""The arithmetic that is worth a careful form: plain functions, each with a one-line reference beside it."""

"""What keeps the project: demo models and data, generated files, measurements."""

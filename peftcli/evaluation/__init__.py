"""What a model can do: its loss on held-out data, and the text it writes."""

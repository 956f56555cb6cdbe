"""Bundled trainers: the same model, data and loop, with one way of weighing the tasks each."""

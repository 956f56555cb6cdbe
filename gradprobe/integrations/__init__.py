"""Callbacks for other people's trainers, one module each; none is imported before it is asked for."""

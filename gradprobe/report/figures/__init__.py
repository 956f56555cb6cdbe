"""One kind of figure a file: pure functions from arrays to the dicts that plotly.js draws."""

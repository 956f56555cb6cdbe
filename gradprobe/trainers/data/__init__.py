"""Data to train on: the embedded phantoms, and data sets in YOLO format."""

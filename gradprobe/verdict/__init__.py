"""What follows from recorded numbers: pure functions on arrays, with numpy alone, that read no file."""

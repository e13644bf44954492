"""What people see of a run: a screen of text, the life of a request, files, a figure. One file an output."""

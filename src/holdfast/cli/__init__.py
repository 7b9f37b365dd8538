"""L6: the command line. One file per command, parsing and printing only; what a command does is done below."""

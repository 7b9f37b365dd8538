"""Who has machines: clouds behind one small interface, and schedulers that launch by themselves."""

"""What a run or a decoder needs and how fast it can go, from the real compilers, on a laptop."""

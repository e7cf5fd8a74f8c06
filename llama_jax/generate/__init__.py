"""Generation: choosing tokens, the decoding loop, and text."""

"""`python main.py COMMAND` from a clone; the same as the installed `llama-jax`."""

from llama_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

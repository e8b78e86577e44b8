"""`python -m hf_dynsparse` is the command `hf-dynsparse`."""

from .cli import main


if __name__ == "__main__":
    main()

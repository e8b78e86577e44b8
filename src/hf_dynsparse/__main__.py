"""`python -m hf_dynsparse` is the command `hf-dynsparse`."""

from hf_dynsparse_cli import main


if __name__ == "__main__":
    main()

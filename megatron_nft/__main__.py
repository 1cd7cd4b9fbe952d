"""`python -m megatron_nft`: the command line; kept light, since child processes start from here."""

from megatron_nft.cli import main

if __name__ == "__main__":
    main()

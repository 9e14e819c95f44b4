"""`python -m perl_megatron` is `perl-megatron`; torchrun starts it this way."""

import sys

from perl_megatron.cli import main

if __name__ == "__main__":  # megatron-core's checkpoint writer starts processes that import this file again
    sys.exit(main())

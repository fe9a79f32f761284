"""``python -m cats_ext`` is the command ``cats``, for ``torchrun -m cats_ext``."""

from cats_ext.cli import main

main()

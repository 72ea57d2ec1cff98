"""`python -m fastmetro_kernels.tune attention`: see `tuning/command.py`."""

from fastmetro_kernels.tuning.command import main

if __name__ == "__main__":
    main()

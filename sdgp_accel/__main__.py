"""``python -m sdgp_accel`` is the ``sdgp`` command; `torchrun -m sdgp_accel train …` starts one per GPU."""

from sdgp_accel.cli import main

if __name__ == "__main__":
    main(prog_name="sdgp")

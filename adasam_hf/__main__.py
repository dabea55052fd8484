"""`python -m adasam_hf`: the command `adasam`, for torchrun and accelerate launch."""

from .cli import main

if __name__ == "__main__":
    main("python -m adasam_hf")
